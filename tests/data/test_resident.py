from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mlomae.config import Config
from mlomae.data import resident
from mlomae.data.batches import PixelBatch
from mlomae.data.loader import LevelLoaders, Part
from mlomae.data.stream import upload_ahead
from mlomae.errors import UserError

MakeConfig = Callable[..., Config]
LEVELS = ("pretrain", "head", "mask")
PART_OF: dict[str, Part] = {"pretrain": "train", "head": "train", "mask": "heldout"}


def sets(tmp_path: Path, fill_folder: Callable[..., None], fill_shard: Callable[..., None]) -> dict[str, Any]:
    """One configuration of ``data`` per kind of source; folder images have sizes of their own."""
    for number, name in enumerate(("a", "b")):
        fill_folder(tmp_path / "folder" / name, 30, first_seed=100 * number, height=9 + number, width=12)
    fill_shard(tmp_path / "shards" / "train-0.tar", 60)
    return {
        "digits": {},
        "folder": {"dataset": "folder", "path": tmp_path / "folder"},
        "shards": {"dataset": "shards", "path": tmp_path / "shards"},
    }


@pytest.mark.parametrize("kind", ["none", "shift", "crop-flip"])
@pytest.mark.parametrize("name", ["digits", "folder", "shards"])
def test_resident_batches_are_the_streamed_ones(
    make_config: MakeConfig,
    tmp_path: Path,
    fill_folder: Callable[..., None],
    fill_shard: Callable[..., None],
    name: str,
    kind: str,
) -> None:
    data = sets(tmp_path, fill_folder, fill_shard)[name] | {"augment": kind}
    both = [
        LevelLoaders(make_config(data=data | {"resident": where}), rank=1, world_size=2)
        for where in ("always", "never")
    ]
    for level in LEVELS:
        inside, outside = (getattr(loaders, level) for loaders in both)
        for _ in range(12):  # over the end of an epoch
            a, b = inside.next(), outside.next()
            assert torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)
            assert (a.number, a.first_row) == (b.number, b.first_row)
        assert inside.state_dict() == outside.state_dict()
        assert inside.state_dict()["next"] == 12


def test_a_resident_stream_continues_where_it_was(make_config: MakeConfig) -> None:
    first, second = (LevelLoaders(make_config(data={"augment": "shift"})).pretrain for _ in range(2))
    batches = [first.next() for _ in range(5)]
    second.load_state_dict({"next": 3})
    assert torch.equal(second.next().images, batches[3].images)


def test_a_resident_set_needs_no_workers_and_is_decoded_once(
    make_config: MakeConfig, tmp_path: Path, fill_folder: Callable[..., None]
) -> None:
    for name in ("a", "b"):
        fill_folder(tmp_path / name, 30)
    data = {"dataset": "folder", "path": tmp_path, "resident": "always", "workers": 2}
    loaders = LevelLoaders(make_config(data=data))
    for path in tmp_path.rglob("*.png"):
        path.unlink()
    before = multiprocessing.active_children()
    for _ in range(20):
        loaders.pretrain.next()
    assert multiprocessing.active_children() == before


def test_a_damaged_image_of_a_resident_set_is_named_at_once(
    make_config: MakeConfig, tmp_path: Path, fill_folder: Callable[..., None]
) -> None:
    for name in ("a", "b"):
        fill_folder(tmp_path / name, 30)
    for path in tmp_path.rglob("*.png"):
        path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"\d+\.png: .*, and \d+ others tried with it are bad too") as caught:
        LevelLoaders(make_config(data={"dataset": "folder", "path": tmp_path, "resident": "always"}))
    assert "\n" not in str(caught.value)


def test_always_refuses_an_augmentation_that_needs_the_originals(make_config: MakeConfig) -> None:
    with pytest.raises(UserError, match=r"data\.resident: always, but data\.augment resized-crop"):
        LevelLoaders(make_config(data={"augment": "resized-crop", "resident": "always"}))


def is_resident(config: Config, level: str) -> bool:
    loaders = LevelLoaders(config)
    subset = loaders._placed(level, PART_OF[level], config.data.augment)  # type: ignore[arg-type]
    return subset.resident


def test_auto_takes_small_sets_that_are_read_often(
    make_config: MakeConfig,
    tmp_path: Path,
    fill_folder: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("a", "b"):
        fill_folder(tmp_path / name, 30)
    folder = {"dataset": "folder", "path": tmp_path}
    size = LevelLoaders(make_config(data=folder)).sizes["train"]
    two_epochs = -(-2 * size // (2 * 8))  # of two steps with batches of 8 each
    assert is_resident(make_config(data=folder, iterations=two_epochs), "pretrain")
    assert not is_resident(make_config(data=folder, iterations=two_epochs - 1), "pretrain")
    assert is_resident(make_config(iterations=1), "pretrain"), "decoded already"
    assert not is_resident(make_config(data={"augment": "resized-crop"}), "pretrain")
    monkeypatch.setattr(resident, "MAX_BYTES", size * 8 * 8 - 1)
    assert not is_resident(make_config(data=folder, iterations=two_epochs), "pretrain")


@pytest.mark.gpu
def test_batches_arrive_on_the_gpu_in_order_and_unharmed() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device = torch.device("cuda")
    pixels = [torch.full((4, 1, 8, 8), number, dtype=torch.uint8) for number in range(9)]
    batches = [PixelBatch(p, torch.arange(4), n, 0).pin_memory() for n, p in enumerate(pixels)]
    for number, batch in enumerate(upload_ahead(iter(batches), device)):
        assert batch.number == number and batch.pixels.device.type == "cuda"
        assert int(batch.pixels.min()) == int(batch.pixels.max()) == number


@pytest.mark.gpu
def test_resident_batches_on_the_gpu_are_those_of_the_cpu(make_config: MakeConfig) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    config = make_config(data={"augment": "crop-flip"})
    gpu, cpu = LevelLoaders(config, device=torch.device("cuda")), LevelLoaders(config)
    for _ in range(5):
        a, b = gpu.pretrain.next(), cpu.pretrain.next()
        torch.testing.assert_close(a.images.cpu(), b.images)
