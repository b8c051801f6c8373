"""Fine-tuning with images, labels or a configuration that do not suit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mlomae.data.dataset import Dataset, TensorSource
from mlomae.data.ledger import FaultLedger
from mlomae.distributed.env import World
from mlomae.downstream import images as images_module
from mlomae.downstream.images import LabelledImages
from mlomae.errors import UserError
from mlomae.interop.reading import read_pretrained
from mlomae.sections import ImagesConfig
from tests.downstream.fine_tuning import config_of, finetune, task_of


@pytest.fixture
def damaged(colour_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """The data section of a copy in which one training and one test image are cut off."""
    folder = tmp_path / "damaged"
    shutil.copytree(colour_folder, folder)
    for name in ("train/red/03.png", "test/blue/01.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:500])
    return {"dataset": "folder", "path": str(folder), "max_bad_share": 0.1}


def test_bad_samples_are_passed_over_and_named(
    colour_run: Path, tmp_path: Path, damaged: dict[str, Any]
) -> None:
    figures = finetune(tmp_path / "out", config_of(colour_run, data=damaged, optim={"batch_size": 60}))

    rows = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == ["red/03.png", "blue/01.png"]
    assert figures["bad_samples"] == 2 and figures["num_test"] == 17


def test_too_many_bad_samples_end_it(colour_run: Path, tmp_path: Path, damaged: dict[str, Any]) -> None:
    data = {**damaged, "max_bad_share": 0.0}

    with pytest.raises(UserError, match=r"data\.max_bad_share: 1 of 60 samples are bad"):
        finetune(tmp_path / "out", config_of(colour_run, data=data, optim={"batch_size": 60}))
    assert "red/03.png" in (tmp_path / "out" / "bad_samples.jsonl").read_text()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optim": {"batch_size": 61}}, r"optim\.batch_size: 61 exceeds the 60 training images; lower it"),
        ({"optim": {"batch_size": 15}, "augment": {"mixup": 0.8}}, r"in pairs; use a multiple of 2"),
        ({"data": {"dataset": "digits"}}, r"digits has 1 channel, but .* takes 3; choose"),
        ({"img_size": 30}, r"img_size: \[30, 30\] is not divisible by the encoder's patch size 8"),
    ],
)
def test_what_does_not_fit_is_one_line(
    colour_run: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        task_of(colour_run, tmp_path, **sections)

    assert "\n" not in str(caught.value)


def test_a_batch_divides_over_the_ranks(colour_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"optim\.batch_size: 16 is not divisible by the 3 ranks"):
        task_of(colour_run, tmp_path, World(0, 3, torch.device("cpu")))


def dataset(train: list[int] | None, test: list[int] | None, classes: int | None = 2) -> Dataset:
    def source(labels: list[int] | None, name: str) -> TensorSource:
        count = 20 if labels is None else len(labels)
        stack = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
        keys = [f"{name}/{number}" for number in range(count)]
        return TensorSource(keys, stack, None if labels is None else torch.tensor(labels))

    return Dataset(source(train, "train"), classes, (0.5,) * 3, (0.5,) * 3, lambda: source(test, "test"))


@pytest.mark.parametrize(
    ("opened", "message"),
    [
        (dataset(None, None, None), r"has no labels; give images with labels"),
        (dataset([0, 1] * 10, None), r"the test images of .* have no labels"),
        (dataset([0, 1] * 10, [0, 2]), r"label 2 among the test images .* the classes 0 to 1"),
        (dataset([0, 1] * 10, [0, -1]), r"label -1 among the test images"),
    ],
)
def test_labels_have_to_be_there(
    colour_run: Path, monkeypatch: pytest.MonkeyPatch, opened: Dataset, message: str
) -> None:
    monkeypatch.setattr(images_module, "open_dataset", lambda *_: opened)
    data = ImagesConfig(dataset="folder", path="pictures")

    with pytest.raises(UserError, match=message):
        LabelledImages(data, read_pretrained(colour_run), FaultLedger(0.1)).test((8, 8))


def test_unlabelled_images_are_left_out(colour_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "open_dataset", lambda *_: dataset([0, 1, -1] * 10, [0, 1]))
    data = ImagesConfig(dataset="folder", path="pictures")

    images = LabelledImages(data, read_pretrained(colour_run), FaultLedger(0.1)).train((8, 8))

    assert images.indices.tolist() == [number for number in range(30) if number % 3 != 2]
