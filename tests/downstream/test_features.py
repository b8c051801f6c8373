"""Features of a frozen encoder: computed once, by any number of ranks, and kept."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mlomae.cli import main
from mlomae.config import load_config
from mlomae.data.batches import Batch
from mlomae.data.loader import LevelLoaders
from mlomae.distributed.env import World
from mlomae.downstream import features
from mlomae.downstream.feature_set import PARTS, FeatureSet, gather_features, join
from mlomae.downstream.knn import Config
from mlomae.models.encoder import ViTEncoder
from tests.distributed.ranks import run_ranks
from tests.integration.tiny import read_result

CPU = torch.device("cpu")


NUM_TEST, NUM_ALL = 18, 78  # images of the colour folder


@pytest.fixture
def run(colour_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(colour_run, tmp_path / "run")


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of every pass of the encoder."""
    seen: list[int] = []
    encode = features._Collector._encode

    def counting(self: Any, images: Tensor) -> Tensor:
        seen.append(len(images))
        return encode(self, images)

    monkeypatch.setattr(features._Collector, "_encode", counting)
    return seen


def evaluate(run: Path, *words: str, task: str = "knn") -> int:
    return main(["eval", task, str(run), *words])


def cache(run: Path) -> Path:
    (folder,) = (run / "eval").glob("features-*")
    return folder


def test_features_are_those_of_the_encoder_in_the_order_of_the_images(run: Path) -> None:
    assert evaluate(run, "--encoder_batch", "7") == 0

    config = load_config(run / "config.yaml", {})
    encoder = ViTEncoder(config.model.arch, config.model.size, config.model.patch_size, 3).eval()
    encoder.load_state_dict(load_file(run / "encoder.safetensors"))
    loaders = LevelLoaders(config)
    for part in PARTS:
        found = load_file(cache(run) / f"{part}.safetensors")
        batches = list(loaders.evaluation(part))
        images = torch.cat([batch.images for batch in batches])
        labels = [batch.labels for batch in batches if batch.labels is not None]
        assert torch.equal(found["labels"], torch.cat(labels))
        expected = encoder(images, pool="mean").detach()
        torch.testing.assert_close(found["features"], expected, rtol=1e-4, atol=1e-5)


def test_pool_size_and_scratch_change_them(run: Path) -> None:
    cases = [[], ["--pool", "cls"], ["--pool", "cls+mean"], ["--img_size", "64"], ["--scratch", "true"]]
    for number, words in enumerate(cases):
        assert evaluate(run, "--out", str(run / "eval" / str(number)), *words) == 0
    sets = [load_file(path)["features"] for path in sorted(run.glob("eval/*/heldout.safetensors"))]
    assert len(sets) == len(cases)
    assert sorted(part.shape[1] for part in sets) == [64, 64, 64, 64, 128]
    assert not any(torch.equal(a, b) for i, a in enumerate(sets) for b in sets[:i])


def test_they_are_computed_once(run: Path, passes: list[int], tmp_path: Path) -> None:
    assert evaluate(run) == 0
    assert sum(passes) == NUM_ALL
    passes.clear()

    assert evaluate(run, "--epochs", "2", task="linear") == 0
    shutil.rmtree(run / "eval" / "knn")
    result = read_result(run / "eval" / "linear")
    assert evaluate(run, "--data.workers", "1") == 0
    assert passes == [] and result["bad_samples"] == 0

    # An unfinished command computes what is missing.
    shutil.rmtree(run / "eval" / "knn")
    before = load_file(cache(run) / "test.safetensors")
    (cache(run) / "test.safetensors").unlink()
    assert evaluate(run) == 0
    after = load_file(cache(run) / "test.safetensors")
    assert sum(passes) == len(after["labels"]) == NUM_TEST
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_command_that_is_killed_keeps_what_is_complete(
    run: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    write = features.write_tensors

    def dying(path: Path, *given: Any) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        write(path, *given)

    with monkeypatch.context() as patch:
        patch.setattr(features, "write_tensors", dying)
        assert evaluate(run) == 130
    first = len(load_file(written[0])["labels"])
    passes.clear()

    assert evaluate(run) == 0
    assert sum(passes) == NUM_ALL - first


@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_damaged_file_is_named(
    damage: str, run: Path, passes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(run) == 0
    path = cache(run) / "heldout.safetensors"
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-1000])
    else:
        shutil.copy(run / "encoder.safetensors", path)
    capsys.readouterr()
    passes.clear()

    assert evaluate(run, task="linear") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mlomae: error: {path}: ") and "delete it" in line
    path.unlink()
    assert evaluate(run, "--epochs", "1", task="linear") == 0
    assert 0 < sum(passes) < NUM_ALL - NUM_TEST


def test_two_commands_do_not_write_the_same_files(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(run) == 0
    folder = cache(run)
    shutil.rmtree(run / "eval" / "knn")
    (folder / "test.safetensors").unlink()
    capsys.readouterr()
    with features._locked(folder):
        assert evaluate(run) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"mlomae: error: {folder}: another process computes these features; wait for it"
    assert evaluate(run) == 0


def test_images_are_those_of_the_run_unless_others_are_named(
    colour_run: Path, colour_folder: Path, tmp_path: Path
) -> None:
    def data(**given: Any) -> Any:
        return Config.model_validate({"encoder": str(colour_run), "data": given}).data

    assert data().dataset == "folder" and data().path == str(colour_folder)
    moved = data(path="elsewhere", workers=2)
    assert (moved.dataset, moved.path, moved.workers) == ("folder", "elsewhere", 2)
    other = data(dataset="csv", path="table.csv")
    assert (other.dataset, other.heldout_fraction) == ("csv", 0.2)


@pytest.fixture
def images(colour_folder: Path, tmp_path: Path) -> Path:
    """A copy of the colour images, to be damaged."""
    return shutil.copytree(colour_folder, tmp_path / "images")


def test_bad_images_are_passed_over_and_counted(
    images: Path, colour_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    victims = [next((images / part / "red").iterdir()) for part in ("train", "test")]
    for victim in victims:
        victim.write_bytes(victim.read_bytes()[:100])
    words = [str(colour_run), "--data.path", str(images), "--data.heldout_fraction", "0.3"]
    first, second = tmp_path / "first", tmp_path / "second"

    assert main(["eval", "knn", *words, "--out", str(first)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "data.max_bad_share: 1 of 60 samples are bad (1 damaged)" in line
    words += ["--data.max_bad_share", "0.05"]
    for folder, task, more in ((first, "knn", []), (second, "linear", ["--epochs", "1"])):
        assert main(["eval", task, *words, *more, "--out", str(folder)]) == 0
        assert json.loads((folder / "result.json").read_text())["bad_samples"] == 2
        lines = [json.loads(line) for line in (folder / "bad_samples.jsonl").read_text().splitlines()]
        assert {line["key"] for line in lines} == {f"red/{victim.name}" for victim in victims}
    sizes = {path.stem: len(load_file(path)["labels"]) for path in tmp_path.glob("features-*/*.safetensors")}
    assert sizes["test"] == 17 and sizes["labelled"] + sizes["heldout"] == 59


def test_a_part_without_a_good_image_is_named(
    images: Path, colour_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (images / "test").glob("*/*"):
        path.write_bytes(b"")
    words = ["--data.path", str(images), "--data.max_bad_share", "1", "--out", str(tmp_path / "out")]
    assert main(["eval", "knn", str(colour_run), *words]) == 2
    assert "data.path: no image of the test set can be used; the first one: " in capsys.readouterr().err


def test_images_need_labels(
    images: Path, colour_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, path in enumerate(images.glob("*/*/*")):
        path.rename(images / f"{number}.png")
    for folder in ("train", "test"):
        shutil.rmtree(images / folder)
    words = ["--data.path", str(images), "--out", str(tmp_path / "out")]
    assert main(["eval", "linear", str(colour_run), *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == f"mlomae: error: data.path: {images} has no labels; give images with labels"


def batches(count: int) -> Iterator[Batch]:
    for number in range(count):
        images = torch.arange(4 * number, 4 * number + 4, dtype=torch.float32)
        yield Batch(images[:, None, None, None].expand(-1, 3, 2, 2), images.long(), number, 0)


def test_features_are_written_where_they_stay() -> None:
    found = gather_features(lambda images: images.mean((2, 3)), batches(5), 30, World(0, 1, CPU))
    assert found is not None and len(found) == 20
    assert torch.equal(found.features, torch.arange(20.0)[:, None].expand(-1, 3))
    assert torch.equal(found.labels, torch.arange(20))
    # Room for 30, of which 20 are seen.
    assert found.features.untyped_storage().nbytes() == 30 * 3 * 4


def test_joined_sets_are_changed_on_the_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlomae.downstream.feature_set._ROWS", 3)
    sets = [FeatureSet(torch.randn(count, 4), torch.arange(count)) for count in (7, 2)]
    joined = join(sets, CPU, lambda rows: rows.mul(2))
    assert torch.equal(joined.features, 2 * torch.cat([part.features for part in sets]))
    assert joined[7:].labels.tolist() == [0, 1]


def evaluate_and_leave(words: list[str]) -> int:
    return main(words)


@pytest.mark.dist
def test_two_ranks_find_what_one_does(run: Path, tmp_path: Path) -> None:
    def words(out: str) -> list[str]:
        options = ["--encoder_batch", "8", "--epochs", "3", "--device", "cpu"]
        return ["eval", "linear", str(run), "--out", str(tmp_path / out / "linear"), *options]

    assert main(words("one")) == 0
    assert run_ranks(2, evaluate_and_leave, words("two")) == [0, 0]
    one, two = (read_result(tmp_path / number / "linear") for number in ("one", "two"))
    assert one == two
    for part in PARTS:
        (first,) = tmp_path.glob(f"one/features-*/{part}.safetensors")
        (second,) = tmp_path.glob(f"two/features-*/{part}.safetensors")
        found, expected = load_file(second), load_file(first)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.dist
def test_what_is_wrong_is_told_by_all_ranks(colour_run: Path, images: Path, tmp_path: Path) -> None:
    for path in (images / "test").glob("*/*"):
        path.write_bytes(b"")
    words = ["eval", "knn", str(colour_run), "--data.path", str(images), "--out", str(tmp_path / "out")]
    assert run_ranks(2, evaluate_and_leave, [*words, "--data.max_bad_share", "1", "--device", "cpu"]) == [
        2,
        2,
    ]
