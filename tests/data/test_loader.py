from __future__ import annotations

import dataclasses
import io
import multiprocessing
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mlomae.config import Config
from mlomae.data.batches import Batch
from mlomae.data.dataset import Dataset, Source, TensorSource
from mlomae.data.loader import LevelLoaders
from mlomae.data.sources import open_dataset
from mlomae.data.splits import make_splits
from mlomae.data.stream import Stream
from mlomae.data.transforms import normalise
from mlomae.errors import UserError
from tests.data.made_scenes import write_scenes

MakeConfig = Callable[..., Config]
LEVELS = ("pretrain", "head", "mask")


def take(stream: Stream | None, count: int) -> list[Batch]:
    assert stream is not None
    return [stream.next() for _ in range(count)]


def assert_same(batches: list[Batch], expected: list[Batch]) -> None:
    for first, second in zip(batches, expected, strict=True):
        assert (first.number, first.first_row) == (second.number, second.first_row)
        assert torch.equal(first.images, second.images)
        assert labels_of([first]) == labels_of([second]) != []


def numbered(count: int) -> Dataset:
    """Images whose one pixel value, and whose label, are their index."""
    indices = torch.arange(count)
    images = indices.to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8).contiguous()
    source = TensorSource([f"n/{index}" for index in range(count)], images, indices)
    return Dataset(source, count, (0.0,), (1.0,), open_test=lambda: source)


def labels_of(batches: Iterable[Batch]) -> list[int]:
    return [label for batch in batches if batch.labels is not None for label in batch.labels.tolist()]


def install(monkeypatch: pytest.MonkeyPatch, dataset: Dataset) -> None:
    monkeypatch.setattr("mlomae.data.loader.open_dataset", lambda *_: dataset)


def test_batches_have_the_promised_form(make_config: MakeConfig) -> None:
    loaders = LevelLoaders(make_config(head={"batch_size": 4}))
    for number, batch in enumerate(take(loaders.head, 3)):
        assert batch.images.shape == (4, 1, 8, 8) and batch.images.dtype == torch.float32
        assert batch.labels is not None and batch.labels.shape == (4,) and batch.labels.dtype == torch.int64
        assert (batch.number, batch.first_row) == (number, 0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("level", ["pretrain", "mask"])
def test_a_resumed_stream_repeats_the_batches(make_config: MakeConfig, level: str, workers: int) -> None:
    reference = take(getattr(LevelLoaders(make_config(data={"augment": "shift"})), level), 6)
    config = make_config(data={"augment": "shift", "workers": workers, "resident": "never"})
    first = getattr(LevelLoaders(config), level)
    assert_same(take(first, 2), reference[:2])
    state = first.state_dict()
    assert state["next"] == 2  # whatever the workers have prefetched
    resumed = getattr(LevelLoaders(config), level)
    resumed.load_state_dict(state)
    assert_same(take(resumed, 4), reference[2:])
    first.load_state_dict({"next": 1})  # also back, on a running stream
    assert_same(take(first, 2), reference[1:3])


def test_close_ends_the_workers_and_keeps_the_position(make_config: MakeConfig) -> None:
    reference = take(LevelLoaders(make_config()).head, 2)
    others = set(multiprocessing.active_children())
    loaders = LevelLoaders(make_config(data={"workers": 1, "resident": "never"}))
    assert_same(take(loaders.head, 1), reference[:1])
    take(loaders.mask, 1)
    assert len(set(multiprocessing.active_children()) - others) == 2
    loaders.close()
    assert set(multiprocessing.active_children()) <= others
    assert_same(take(loaders.head, 1), reference[1:])


def test_streams_leave_the_global_generator_alone(make_config: MakeConfig) -> None:
    state = torch.get_rng_state()
    loaders = LevelLoaders(make_config(data={"augment": "crop-flip"}))
    take(loaders.pretrain, 2), list(loaders.evaluation("heldout"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_batch_of_one_rank(make_config: MakeConfig, world_size: int) -> None:
    config = make_config(data={"augment": "crop-flip"})
    alone = LevelLoaders(config)
    ranks = [LevelLoaders(config, rank, world_size) for rank in range(world_size)]
    for level in ("pretrain", "head", "mask"):
        for _ in range(3):
            whole = getattr(alone, level).next()
            shares = [getattr(loaders, level).next() for loaders in ranks]
            assert torch.equal(torch.cat([share.images for share in shares]), whole.images)
            assert torch.equal(torch.cat([share.labels for share in shares]), whole.labels)
            assert [share.first_row for share in shares] == [r * 8 // world_size for r in range(world_size)]


def test_an_epoch_visits_each_sample_once_in_a_fresh_order(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, numbered(60))
    size = LevelLoaders(make_config()).sizes["train"]
    loaders = LevelLoaders(make_config(pretrain={"batch_size": 1}, head={"batch_size": size // 2 - 1}))
    members = labels_of(loaders.evaluation("train"))
    first, second = (labels_of(take(loaders.pretrain, size)) for _ in range(2))
    assert sorted(first) == sorted(second) == members
    assert first != second
    # The head's batch does not divide its set: the rest of an epoch is dropped, never mixed with the next.
    for _ in range(3):
        epoch = labels_of(take(loaders.head, 2))
        assert len(set(epoch)) == len(epoch) == 2 * (size // 2 - 1)


def test_levels_draw_from_their_own_set_in_their_own_order(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, numbered(100))
    loaders = LevelLoaders(make_config())
    train, heldout = (set(labels_of(loaders.evaluation(part))) for part in ("train", "heldout"))
    assert train | heldout == set(range(100)) and not train & heldout
    pretrain, head, mask = (labels_of(take(s, 2)) for s in (loaders.pretrain, loaders.head, loaders.mask))
    assert set(pretrain) <= train and set(head) <= train and set(mask) <= heldout
    assert pretrain != head


def test_only_training_images_are_augmented(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (80, 1, 8, 8), dtype=torch.uint8)
    source = TensorSource([str(index) for index in range(80)], images, torch.arange(80))
    install(monkeypatch, Dataset(source, 80, (0.5,), (0.25,), open_test=lambda: source))
    loaders = LevelLoaders(make_config(data={"augment": "shift"}))

    def plain(batch: Batch) -> Tensor:
        assert batch.labels is not None
        originals = normalise(images[batch.labels], (0.5,), (0.25,))
        return (batch.images == originals).flatten(1).all(1)

    assert not plain(loaders.pretrain.next()).all()
    assert not plain(take(loaders.head, 1)[0]).all()
    assert plain(take(loaders.mask, 1)[0]).all()
    for part in ("train", "heldout", "test"):
        assert all(plain(batch).all() for batch in loaders.evaluation(part))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_gives_every_image_once_in_order(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    install(monkeypatch, numbered(72))
    loaders = LevelLoaders(
        make_config(data={"workers": workers}, eval={"batch_size": 32}), rank=1, world_size=2
    )
    batches = list(loaders.evaluation("test"))
    assert labels_of(batches) == list(range(72))
    assert [(len(b.images), b.number, b.first_row) for b in batches] == [(32, 0, 0), (32, 1, 0), (8, 2, 0)]
    heldout = labels_of(loaders.evaluation("heldout"))
    assert heldout == sorted(heldout) and len(heldout) == loaders.sizes["heldout"]


def test_a_sample_is_the_first_images_of_the_set(make_config: MakeConfig) -> None:
    loaders = LevelLoaders(make_config())
    first = next(iter(loaders.evaluation("heldout"))).images
    assert torch.equal(loaders.sample("heldout", 5).images, first[:5])
    assert len(loaders.sample("heldout", 10**6).images) == loaders.sizes["heldout"]


def test_sizes_follow_the_split_or_the_listed_files(
    make_config: MakeConfig, tmp_path: Path, fill_folder: Callable[..., None], fill_shard: Callable[..., None]
) -> None:
    digits = LevelLoaders(make_config())
    assert sum(digits.sizes.values()) == 1797 and set(digits.sizes) == {"train", "heldout", "test"}
    assert len(labels_of(digits.evaluation("test"))) == digits.sizes["test"]
    fill_folder(tmp_path / "train" / "a", 60)
    fill_folder(tmp_path / "test" / "a", 7, first_seed=100)
    fill_shard(tmp_path / "train-0.tar", 60)
    fill_shard(tmp_path / "test-0.tar", 7, first_seed=100)
    folder, shards = (
        LevelLoaders(make_config(data={"dataset": name, "path": tmp_path})) for name in ("folder", "shards")
    )
    assert folder.sizes["train"] + folder.sizes["heldout"] == 60 and folder.sizes["test"] == 7
    assert "test" not in shards.sizes
    assert len(labels_of(shards.evaluation("test"))) == 7


class GuardedSource:
    """Gives images that lie in memory as files, and refuses those of ``forbidden`` indices."""

    stack = None

    def __init__(self, original: TensorSource, forbidden: Iterable[int]) -> None:
        self.keys, self.labels = original.keys, original.labels
        self._original, self._forbidden = original, frozenset(forbidden)

    def __len__(self) -> int:
        return len(self.keys)

    def content(self, index: int) -> bytes:
        assert index not in self._forbidden, f"test image {index} was read"
        content = io.BytesIO()
        Image.fromarray(self._original.stack[index, 0].numpy()).save(content, "PNG")
        return content.getvalue()


def stream_all(loaders: LevelLoaders, steps: int) -> None:
    """More than an epoch of every level, and what a run does besides."""
    for stream in (loaders.pretrain, loaders.head, loaders.mask):
        take(stream, steps)
    assert labels_of(loaders.evaluation("heldout"))
    assert len(loaders.sample("heldout", 4).images) == 4
    assert loaders.sizes


def test_a_split_off_test_set_is_never_read_in_training(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(data={"augment": "shift"}, **{level: {"batch_size": 64} for level in LEVELS})
    dataset = open_dataset(config.data, 1)
    test = make_splits(dataset, config.data).test
    assert test is not None
    assert isinstance(dataset.train, TensorSource)
    guarded = GuardedSource(dataset.train, test.tolist())
    install(monkeypatch, dataclasses.replace(dataset, train=guarded))
    loaders = LevelLoaders(config)
    stream_all(loaders, steps=25)
    with pytest.raises(AssertionError, match="test image"):
        list(loaders.evaluation("test"))


def test_an_own_test_part_is_never_opened_in_training(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> Source:
        raise AssertionError("the test part was opened")

    install(monkeypatch, dataclasses.replace(numbered(60), open_test=refuse))
    loaders = LevelLoaders(make_config())
    stream_all(loaders, steps=10)
    with pytest.raises(AssertionError, match="the test part was opened"):
        loaders.evaluation("test")


@pytest.mark.parametrize("name", ["folder", "shards"])
def test_training_streams_over_destroyed_test_files(
    make_config: MakeConfig,
    tmp_path: Path,
    fill_folder: Callable[..., None],
    fill_shard: Callable[..., None],
    name: str,
) -> None:
    fill_folder(tmp_path / "train" / "a", 60)
    fill_folder(tmp_path / "test" / "a", 6, first_seed=100)
    fill_shard(tmp_path / "train-0.tar", 60)
    fill_shard(tmp_path / "test-0.tar", 6, first_seed=100)
    loaders = LevelLoaders(make_config(data={"dataset": name, "path": tmp_path}))
    for path in [tmp_path / "test-0.tar", *(tmp_path / "test" / "a").iterdir()]:
        path.write_bytes(b"destroyed")
    stream_all(loaders, steps=10)
    with pytest.raises(
        UserError, match=r"6 of \d+ samples are bad" if name == "folder" else r"not a complete tar file"
    ):
        list(loaders.evaluation("test"))
        loaders.ledger.check()


@pytest.mark.parametrize("workers", [0, 2])
def test_damaged_training_images_are_one_line_naming_one(
    make_config: MakeConfig, tmp_path: Path, fill_folder: Callable[..., None], workers: int
) -> None:
    fill_folder(tmp_path / "train" / "a", 60)
    data = {"dataset": "folder", "path": tmp_path, "workers": workers, "resident": "never"}
    config = make_config(data=data)
    expected = take(LevelLoaders(config).pretrain, 1)
    loaders = LevelLoaders(config)
    saved = shutil.copytree(tmp_path / "train", tmp_path / "saved")
    for path in (tmp_path / "train" / "a").iterdir():
        path.write_bytes(b"damaged")
    with pytest.raises(
        UserError, match=r"34 of 60 samples are bad .* the last one is a/\d+\.png \("
    ) as caught:
        loaders.pretrain.next()
    assert "\n" not in str(caught.value)
    shutil.copytree(saved, tmp_path / "train", dirs_exist_ok=True)
    assert_same([loaders.pretrain.next()], expected)  # the failed batch is not skipped
    loaders.close()


def test_a_policy_that_learns_needs_labels(
    make_config: MakeConfig, tmp_path: Path, fill_folder: Callable[..., None]
) -> None:
    fill_folder(tmp_path, 60)
    data = {"dataset": "folder", "path": tmp_path}
    message = (
        f"data.path: {tmp_path} has no labels; the head and mask levels need them "
        "(masking.policy=random does not)"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        LevelLoaders(make_config(data=data))
    loaders = LevelLoaders(make_config(data=data, masking={"policy": "random"}))
    assert loaders.head is None and loaders.mask is None and loaders.num_classes is None
    assert loaders.pretrain.next().labels is None
    assert all(batch.labels is None for batch in loaders.evaluation("test"))


def test_a_label_loss_needs_classes_of_all_training_images(
    make_config: MakeConfig, tmp_path: Path, fill_folder: Callable[..., None]
) -> None:
    fields = {"masking": {"policy": "random"}, "pretrain": {"label_weight": 0.5, "batch_size": 4}}
    assert LevelLoaders(make_config(**fields)).pretrain.next().labels is not None

    def refusal(dataset: str, name: str, **data: Any) -> str:
        data = {"dataset": dataset, "path": tmp_path / name, **data}
        with pytest.raises(UserError) as caught:
            LevelLoaders(make_config(model={"in_chans": 3}, data=data, **fields))
        return str(caught.value)

    message = "pretrain.label_weight: needs a class for every training image, found {}; set it to 0"
    fill_folder(tmp_path / "plain", 60)
    assert refusal("folder", "plain") == message.format("no labels")
    write_scenes(tmp_path / "scenes", "training", 60)
    write_scenes(tmp_path / "scenes", "validation", 1, first=60)
    assert refusal("scenes", "scenes", num_classes=3, void=(7,)) == message.format("label maps")
    for number, name in enumerate(("cat", "dog", "unlabelled")):
        fill_folder(tmp_path / "partly" / name, 30, first_seed=100 * number)
    partly = refusal("folder", "partly")
    found = re.fullmatch(re.escape(message).replace(re.escape("{}"), r"30 of (\d+) without one"), partly)
    assert found and 30 < int(found[1]) < 90


@pytest.mark.parametrize("level, part", [("pretrain", "train"), ("head", "train"), ("mask", "heldout")])
def test_a_batch_larger_than_its_set(make_config: MakeConfig, level: str, part: Any) -> None:
    size = LevelLoaders(make_config()).sizes[part]
    LevelLoaders(make_config(**{level: {"batch_size": size}}))
    with pytest.raises(
        UserError, match=rf"{level}\.batch_size: {size + 1} exceeds its set of {size} images; lower it"
    ):
        LevelLoaders(make_config(**{level: {"batch_size": size + 1}}))


@pytest.mark.parametrize("level", LEVELS)
def test_a_batch_that_does_not_divide_over_the_ranks(make_config: MakeConfig, level: str) -> None:
    config = make_config(**{level: {"batch_size": 10}})
    with pytest.raises(
        UserError, match=rf"{level}\.batch_size: 10 is not divisible by the 4 ranks; use a multiple"
    ):
        LevelLoaders(config, 0, 4)


def test_real_photographs(make_config: MakeConfig, shared_data: Path) -> None:
    loaders = LevelLoaders(
        make_config(
            model={"img_size": 64, "patch_size": 16, "in_chans": 3},
            data={"dataset": "folder", "path": shared_data / "imagenet_sample", "augment": "resized-crop"},
        )
    )
    assert loaders.num_classes == 240
    assert sum(loaders.sizes.values()) == 240
    for batch in (loaders.pretrain.next(), *take(loaders.mask, 1)):
        assert batch.images.shape == (8, 3, 64, 64)
        assert batch.images.std() == pytest.approx(1, abs=0.5)  # photographs, normalised
