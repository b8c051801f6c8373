"""Whole runs on small folders and shards; the test set stays closed until the evaluation."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mlomae.cli import main
from mlomae.data.loader import LevelLoaders
from mlomae.data.subset import Loaded, Subset
from mlomae.errors import UserError
from mlomae.report.pictures import read_latest
from mlomae.trainer import Trainer
from tests.integration.tiny import read_metrics, tiny_config, train, without_pictures, write_recipe

ACCURACIES = {"knn_accuracy", "linear_accuracy", "pixel_knn_accuracy", "pixel_linear_accuracy"}
COLOUR = {"model.in_chans": 3, "iterations": 2, "eval.knn_k": 3, "eval.pixels": True}


def run(folder: Path, fields: dict[str, Any]) -> dict[str, Any]:
    """A whole run through the command line; the content of result.json."""
    recipe = write_recipe(folder / "tiny.yaml", fields)
    assert main(["train", "--config", str(recipe), "--run-dir", str(folder / "run")]) == 0
    result: dict[str, Any] = json.loads((folder / "run" / "result.json").read_text())
    assert result["iterations"] == len(read_metrics(folder / "run"))
    return result


def test_a_folder_of_classes(fill_images: Callable[..., Path], tmp_path: Path) -> None:
    result = run(tmp_path, {"data.dataset": "folder", "data.path": str(fill_images()), **COLOUR})

    assert result.keys() >= ACCURACIES
    assert all(0 <= result[name] <= 1 for name in ACCURACIES)
    with Image.open(tmp_path / "run" / "mask.png") as picture:
        assert picture.width > 100
    latest = read_latest(tmp_path / "run")
    assert latest is not None and latest.classes is not None
    assert latest.classes.names == ["class0", "class1"]


def test_a_folder_without_labels_needs_no_upper_levels(
    fill_images: Callable[..., Path], tmp_path: Path
) -> None:
    folder = fill_images(labelled=False)
    fields = {"data.dataset": "folder", "data.path": str(folder), "masking.policy": "random", **COLOUR}

    result = run(tmp_path, fields)

    assert result["policy"] == "random"
    assert not [name for name in result if "accuracy" in name]


def test_shards_written_by_webdataset(tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    write_shard(shards / "train-000000.tar", 0, 40)
    write_shard(shards / "train-000001.tar", 40, 24)
    write_shard(shards / "test-000000.tar", 100, 10)

    result = run(tmp_path, {"data.dataset": "shards", "data.path": str(shards), **COLOUR})

    # Ten test images: accuracies are tenths.
    assert all(result[name] * 10 == pytest.approx(round(result[name] * 10)) for name in ACCURACIES)


def write_shard(path: Path, first: int, count: int) -> None:
    from webdataset import TarWriter

    path.parent.mkdir(exist_ok=True)
    with TarWriter(str(path)) as writer:
        for number in range(first, first + count):
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            writer.write({"__key__": f"{number:05d}", "png": pixels, "cls": number % 2})


def test_options_of_shards(tmp_path: Path) -> None:
    for number in range(4):
        write_shard(tmp_path / f"a-{number}.tar", 16 * number, 16)
    write_shard(tmp_path / "b-0.tar", 100, 6)

    def loaders(**data: Any) -> LevelLoaders:
        fields = {"dataset": "shards", "path": f"{tmp_path}/a-*.tar", "resident": "never", **data}
        return LevelLoaders(tiny_config({**COLOUR, **{f"data.{name}": v for name, v in fields.items()}}))

    tested = loaders(test_path=f"{tmp_path}/b-*.tar").evaluation("test")
    assert sum(len(batch.images) for batch in tested) == 6 != loaders().sizes["test"]
    orders = [
        loaders(**data).pretrain.next().images
        for data in ({}, {"access": "sequential"}, {"access": "sequential", "shuffle_buffer": 8})
    ]
    assert not any(torch.equal(a, b) for number, a in enumerate(orders) for b in orders[:number])


@pytest.mark.parametrize("share", [0.0, 0.1])
def test_bad_samples_up_to_a_share(share: float, fill_images: Callable[..., Path], tmp_path: Path) -> None:
    folder = fill_images()
    victim = sorted(folder.glob("*/*.png"))[5]
    victim.write_bytes(victim.read_bytes()[:50])
    fields = {
        "run_dir": tmp_path / "run", "data.dataset": "folder", "data.path": folder,
        "data.max_bad_share": share, "data.test_fraction": 0.05, "data.heldout_fraction": 0.1, **COLOUR,
    }  # fmt: skip
    if not share:
        with pytest.raises(UserError, match=r"data\.max_bad_share: 1 of \d+ samples are bad \(1 damaged\)"):
            Trainer.evaluate(train(tiny_config(fields)))
        return
    result = Trainer.evaluate(train(tiny_config(fields)))
    assert result["bad_samples"] == 1
    (line,) = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == victim.relative_to(folder).as_posix()
    assert json.loads(line)["kind"] == "damaged"


def test_images_need_not_be_square(tmp_path: Path) -> None:
    for number in range(48):
        folder = tmp_path / "images" / str(number % 3)
        folder.mkdir(parents=True, exist_ok=True)
        # Of several sizes, all wider than high.
        shape = (10, 12 + 2 * (number % 4), 3)
        pixels = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    fields = {
        "data.dataset": "folder",
        "data.path": str(tmp_path / "images"),
        "data.augment": "resized-crop",
        "model.img_size": [8, 12],
        **COLOUR,
    }

    result = run(tmp_path, fields)

    assert result.keys() >= ACCURACIES
    (row, _) = read_metrics(tmp_path / "run")
    assert len(row["mask/frequency"]) == 4 * 6


@pytest.mark.parametrize("dataset", ["folder", "shards"])
def test_a_broken_test_part_is_noticed_by_the_evaluation_only(
    dataset: str, fill_images: Callable[..., Path], tmp_path: Path
) -> None:
    if dataset == "folder":
        data = tmp_path / "data"
        data.mkdir()
        fill_images().rename(data / "train")
        for label in ("class0", "class1"):
            (data / "test" / label).mkdir(parents=True)
            (data / "test" / label / "x.png").write_bytes(b"poison")
    else:
        data = tmp_path / "shards"
        write_shard(data / "train-000000.tar", 0, 64)
        (data / "test-000000.tar").write_bytes(b"poison" * 1000)
    fields = {"run_dir": tmp_path / "run", "data.dataset": dataset, "data.path": data, **COLOUR}

    trainer = train(tiny_config({**fields, "data.augment": "crop-flip", "picture_every": 1}))

    assert (tmp_path / "run" / "mask.png").exists()
    with pytest.raises(UserError, match=r"(no image of the test set can be used|not a complete tar file)"):
        Trainer.evaluate(trainer)


@pytest.mark.parametrize("resident", ["always", "never"])
def test_a_test_set_split_off_is_not_read_in_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resident: str
) -> None:
    seen: list[Tensor] = []

    def recording(read: Callable[..., Loaded]) -> Callable[..., Loaded]:
        def record(self: Subset, rows: Tensor, *args: Any) -> Loaded:
            if not self.resident:  # else it was read before
                seen.append(self.indices[rows])
            return read(self, rows, *args)

        return record

    monkeypatch.setattr(Subset, "read", recording(Subset.read))
    monkeypatch.setattr(Subset, "read_good", recording(Subset.read_good))
    without_pictures(monkeypatch)
    # Enough batches for whole epochs of every set.
    batches = {f"{level}.batch_size": 256 for level in ("pretrain", "head", "mask")}
    fields = {"run_dir": tmp_path, "iterations": 5, "data.resident": resident, **batches}
    trainer = train(tiny_config(fields))
    assert len(trainer.loaders.sample("heldout", 8).images)
    in_training = set(torch.cat(seen).tolist())
    seen.clear()
    tested = sum(len(batch.images) for batch in trainer.loaders.evaluation("test"))
    test = set(torch.cat(seen).tolist())

    assert len(test) == tested > 300
    assert len(in_training) > 1200
    assert in_training & test == set()
