"""What a run leaves of its pictures: the latest one whole, and a line for each that came before."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mlomae.cli import main
from mlomae.tensor_file import read_tensors
from mlomae.trainer import Trainer
from tests.integration.tiny import tiny_config, train

FIELDS: dict[str, Any] = {
    "iterations": 6,
    "picture_every": 2,
    "checkpoint_every": 4,
    "hypergradient.every": 1,
}


class WithoutEvaluation(Trainer):
    def evaluate(self) -> dict[str, Any]:
        return {}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pictures") / "run"
    train(tiny_config({"run_dir": folder, **FIELDS}), kind=WithoutEvaluation)
    return folder


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "pictures.jsonl").read_text().splitlines()]


def latest_of(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    found = read_tensors(folder / "pictures.safetensors")
    assert found is not None
    return found


def test_the_history_ends_in_the_latest_picture(run: Path) -> None:
    lines, (tensors, state) = lines_of(run), latest_of(run)
    assert [line["step"] for line in lines] == [2, 4, 6] and state["step"] == 6
    last, (rows, columns) = lines[-1], state["grid"]
    assert last["grid"] == state["grid"] and last["images"] == len(tensors["images"]) == 8
    shape = (8, rows * columns)
    probability = np.frombuffer(base64.b64decode(last["probability"]), np.uint8).reshape(shape)
    np.testing.assert_allclose(probability / 255, tensors["probability"].float().numpy(), atol=1 / 255)
    removed = np.unpackbits(np.frombuffer(base64.b64decode(last["removed"]), np.uint8))[: 8 * rows * columns]
    assert np.array_equal(removed.reshape(shape), tensors["removed"].numpy())


def test_frequencies_are_means_of_masks(run: Path) -> None:
    tensors, _ = latest_of(run)
    count, by_class = tensors["class_count"], tensors["class_frequency"]
    assert len(count) == 10 and count.sum() > 100
    whole = (by_class * count[:, None]).sum(dim=0) / count.sum()
    torch.testing.assert_close(tensors["frequency"], whole)
    ratio = tiny_config({}).masking.ratio
    assert float(tensors["frequency"].mean()) == pytest.approx(ratio, abs=0.02)


def test_the_influence_of_the_last_hypergradient_is_kept(run: Path) -> None:
    tensors, state = latest_of(run)
    assert state["influence_step"] == 6
    assert tensors["influence"].shape == tensors["influence_removed"].shape
    assert len(tensors["influence_images"]) == len(tensors["influence"]) == 8
    removed = tensors["influence"][tensors["influence_removed"].bool()]
    assert removed.isfinite().all() and removed.abs().max() > 0


def test_a_policy_that_does_not_learn_has_no_influence(tmp_path: Path) -> None:
    fields = {"run_dir": tmp_path, **FIELDS, "masking.policy": "random", "iterations": 2}
    train(tiny_config(fields), kind=WithoutEvaluation)
    tensors, state = latest_of(tmp_path)
    assert state["influence_step"] is None and "influence" not in tensors
    assert {"frequency", "class_frequency", "reconstruction"} <= tensors.keys()


def test_what_runs_again_is_recorded_once(run: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(
        max((folder / "checkpoints").glob("step-*"))
    )  # as if it had been killed before the last one
    train(tiny_config({"run_dir": folder, **FIELDS}), kind=WithoutEvaluation)
    assert [line["step"] for line in lines_of(folder)] == [2, 4, 6]
    assert lines_of(folder) == lines_of(run)


def test_the_environment_is_told(run: Path) -> None:
    told = json.loads((run / "environment.json").read_text())
    assert torch.__version__.startswith(told["torch"].split("+")[0])
    assert told["world_size"] == 1 and told["device"] and told["precision"] == "float32"


@pytest.mark.parametrize("what", ["run", "checkpoint"])
def test_visualize_draws_images_of_ones_own(what: str, run: Path, tmp_path: Path) -> None:
    images = [tmp_path / f"{number}.png" for number in range(2)]
    for number, path in enumerate(images):
        Image.fromarray(np.random.default_rng(number).integers(0, 255, (20, 30), np.uint8)).save(path)
    before = sorted(path.name for path in run.iterdir())
    source = run if what == "run" else min((run / "checkpoints").glob("step-*"))
    out = tmp_path / "out.png"

    assert main(["visualize", str(source), *map(str, images), "--out", str(out)]) == 0

    with Image.open(out) as picture:
        assert picture.width > 5 * 150 and picture.height > 2 * 100
    assert sorted(path.name for path in run.iterdir()) == before


def test_visualize_says_what_is_wrong(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.png").write_text("no image")
    for words, told in (
        ((tmp_path, tmp_path / "text.png"), "is neither a run directory nor a checkpoint"),
        ((run, tmp_path / "absent.png"), "cannot be read"),
        ((run, tmp_path / "text.png"), "text.png: "),
        ((run, *[tmp_path / "text.png"] * 33), "33 of them do not fit on a page"),
        ((run, tmp_path / "text.png", "--out", tmp_path / "no" / "x.png"), "is not a folder"),
    ):
        assert main(["visualize", *map(str, words)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and told in lines[0]
