from __future__ import annotations

import io
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mlomae.config import DataConfig
from mlomae.data.shards import MAX_OPEN, ShardSource
from mlomae.data.sources import Dataset, open_dataset
from mlomae.errors import UserError


def open_shards(path: Path, in_chans: int = 3) -> Dataset:
    return open_dataset(DataConfig(dataset="shards", path=path), in_chans)


def pixels(content: bytes, mode: str = "RGB") -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert(mode))


def test_samples_have_keys_labels_and_pixels(
    tmp_path: Path, encode: Callable[..., bytes], write_tar: Callable[..., None]
) -> None:
    contents = [encode(seed, 9, 6, format=format) for seed, format in enumerate(("PNG", "JPEG", "WEBP"))]
    write_tar(tmp_path / "train-0.tar", {"a.png": contents[0], "a.cls": b"2\n", "README": b"no suffix"})
    write_tar(
        tmp_path / "train-1.tar",
        {
            "sub/a.json": b'{"label": 0, "x": 1}',
            "sub/a.JPG": contents[1],
            "b.webp": contents[2],
            "b.cls": b"1",
        },
    )
    dataset = open_shards(tmp_path)
    assert dataset.train.keys == ["train-0.tar/a", "train-1.tar/sub/a", "train-1.tar/b"]
    assert dataset.train.labels is not None and dataset.train.labels.tolist() == [2, 0, 1]
    assert dataset.num_classes == 3 and dataset.open_test is None
    for index, content in enumerate(contents):
        image = dataset.train.read(index)
        assert image.dtype == torch.uint8 and image.shape == (3, 9, 6)
        assert np.array_equal(image.permute(1, 2, 0).numpy(), pixels(content))
    grey = open_shards(tmp_path, in_chans=1).train.read(0)
    assert np.array_equal(grey[0].numpy(), pixels(contents[0], "L"))


def test_class_names_count_the_classes(tmp_path: Path, fill_shard: Callable[..., None]) -> None:
    fill_shard(tmp_path / "train-0.tar", 4)
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    assert open_shards(tmp_path).num_classes == 3


def test_shards_without_labels(
    tmp_path: Path, encode: Callable[..., bytes], write_tar: Callable[..., None]
) -> None:
    write_tar(
        tmp_path / "train-0.tar", {"a.png": encode(0), "a.json": b'{"caption": "x"}', "b.png": encode(1)}
    )
    dataset = open_shards(tmp_path)
    assert dataset.train.labels is None and dataset.num_classes is None


@pytest.mark.parametrize("part", ["test", "val"])
def test_the_test_part_is_opened_only_when_asked_for(
    tmp_path: Path, fill_shard: Callable[..., None], part: str
) -> None:
    fill_shard(tmp_path / "train-0.tar", 4)
    (tmp_path / f"{part}-0.tar").write_bytes(b"not a tar file")
    dataset = open_shards(tmp_path)
    assert dataset.open_test is not None
    with pytest.raises(UserError, match=rf"{part}-0\.tar: not a complete tar file"):
        dataset.open_test()
    fill_shard(tmp_path / f"{part}-0.tar", 6, first_seed=50)
    assert len(dataset.open_test()) == 6


def test_a_pickled_copy_reads_the_same(tmp_path: Path, fill_shard: Callable[..., None]) -> None:
    fill_shard(tmp_path / "train-0.tar", 3)
    source = open_shards(tmp_path).train
    image = source.read(2)
    assert torch.equal(pickle.loads(pickle.dumps(source)).read(2), image)


def test_many_shards_keep_few_descriptors(tmp_path: Path, fill_shard: Callable[..., None]) -> None:
    names = [f"train-{number:03d}.tar" for number in range(MAX_OPEN + 5)]
    for number, name in enumerate(names):
        fill_shard(tmp_path / name, 1, first_seed=number)
    source = ShardSource(tmp_path, names, 3)
    before = len(list(Path("/proc/self/fd").iterdir()))
    images = [source.read(index) for index in range(len(source))]
    assert len(list(Path("/proc/self/fd").iterdir())) - before == MAX_OPEN
    assert torch.equal(source.read(0), images[0])
    del source
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_every_cut_of_a_shard_is_noticed(tmp_path: Path, fill_shard: Callable[..., None]) -> None:
    shard = tmp_path / "train-0.tar"
    fill_shard(shard, 4)
    whole = shard.read_bytes()
    content_end = len(whole.rstrip(b"\0"))
    for cut in range(0, content_end, 512):  # also exactly between two members
        shard.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"train-0\.tar: not a complete tar file"):
            open_shards(tmp_path)


def test_a_damaged_header_is_noticed(tmp_path: Path, fill_shard: Callable[..., None]) -> None:
    shard = tmp_path / "train-0.tar"
    fill_shard(shard, 4)
    content = bytearray(shard.read_bytes())
    start = content.index(b"s002.png")
    content[start : start + 100] = b"x" * 100
    shard.write_bytes(content)
    with pytest.raises(UserError, match=rf"train-0\.tar: not a complete tar file .*byte {start}"):
        open_shards(tmp_path)


@pytest.mark.parametrize(
    "members, message",
    [
        (
            {"a.txt": b"x", "a.cls": b"0"},
            r"train-0\.tar: sample 'a' has no image, only txt, cls; expected one of jpg",
        ),
        ({"a.png": None, "a.cls": b"cat"}, r"train-0\.tar: a\.cls holds b'cat', expected a class number"),
        ({"a.png": None, "a.cls": b"-1"}, r"a\.cls holds b'-1', expected a class number"),
        ({"a.png": None, "a.json": b"[]"}, r"a\.json holds b'\[\]', expected \{\"label\": class number\}"),
        ({"a.png": None, "a.json": b'{"label": "x"}'}, r"a\.json holds .* expected \{\"label\""),
        (
            {"a.png": None, "a.PNG": None},
            r"train-0\.tar: two members are called a\.PNG; sample keys must be unique",
        ),
        ({"a.png": None, "a.cls": b"1", "b.png": None}, r"train-0\.tar/b: has no label although others have"),
        ({"README": b"x"}, r"data\.path: no samples in .*train-0\.tar"),
    ],
)
def test_bad_members_are_named(
    tmp_path: Path,
    encode: Callable[..., bytes],
    write_tar: Callable[..., None],
    members: dict[str, bytes | None],
    message: str,
) -> None:
    write_tar(tmp_path / "train-0.tar", {name: encode(0) if c is None else c for name, c in members.items()})
    with pytest.raises(UserError, match=message):
        open_shards(tmp_path)


def test_an_undecodable_image_is_named(tmp_path: Path, write_tar: Callable[..., None]) -> None:
    write_tar(tmp_path / "train-0.tar", {"a.jpg": b"\xff\xd8 broken"})
    with pytest.raises(UserError, match=r"train-0\.tar/a: cannot be decoded \(.*\); replace it") as caught:
        open_shards(tmp_path).train.read(0)
    assert "\n" not in str(caught.value)


def test_labels_beyond_the_known_classes(tmp_path: Path, fill_shard: Callable[..., None]) -> None:
    fill_shard(tmp_path / "train-0.tar", 1)
    fill_shard(tmp_path / "test-0.tar", 2, first_seed=9)
    dataset = open_shards(tmp_path)
    assert dataset.open_test is not None
    with pytest.raises(UserError, match=r"test-0\.tar: found label 1, expected 0 to 0"):
        dataset.open_test()
    (tmp_path / "classes.json").write_text("{}")
    with pytest.raises(UserError, match=r"classes\.json: not a JSON list of class names"):
        open_shards(tmp_path)


def test_unlabelled_test_shards_of_labelled_training(
    tmp_path: Path,
    fill_shard: Callable[..., None],
    encode: Callable[..., bytes],
    write_tar: Callable[..., None],
) -> None:
    fill_shard(tmp_path / "train-0.tar", 2)
    write_tar(tmp_path / "test-0.tar", {"a.png": encode(7)})
    dataset = open_shards(tmp_path)
    assert dataset.open_test is not None
    with pytest.raises(UserError, match=r"test-0\.tar: has no labels, but the training shards have"):
        dataset.open_test()


def test_a_folder_without_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"data.path: no train-*.tar in {tmp_path}")):
        open_shards(tmp_path)


def test_real_shards(tmp_path: Path, shared_data: Path) -> None:
    for name in ("train-0000.tar", "train-0024.tar", "test-0000.tar", "classes.json"):
        (tmp_path / name).symlink_to(shared_data / "cifar10" / name)
    dataset = open_shards(tmp_path)
    assert len(dataset.train) == 4000 and len(set(dataset.train.keys)) == 4000
    assert dataset.num_classes == 10 and dataset.train.labels is not None
    assert dataset.train.labels.bincount().min() > 300
    assert dataset.open_test is not None
    assert len(dataset.open_test()) == 2000
    images = torch.stack([dataset.train.read(index) for index in range(0, 4000, 20)])
    assert images.shape == (200, 3, 32, 32)
    # The file-wide statistics of CIFAR-10, which a wrong channel order or offset would miss.
    assert torch.allclose(
        images.float().mean((0, 2, 3)) / 255, torch.tensor([0.491, 0.482, 0.447]), atol=0.03
    )
