from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from PIL import Image

from mlomae.data import medmnist
from mlomae.data.dataset import Dataset, Source
from mlomae.data.sources import open_dataset
from mlomae.errors import UserError
from mlomae.sections import DataConfig

Array = npt.NDArray[Any]


def pixels(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def labels(*numbers: int) -> Array:
    return np.array(numbers, dtype=np.uint8)[:, None]


@pytest.fixture
def open_arrays(tmp_path: Path) -> Callable[..., Dataset]:
    """Writes arrays as MedMNIST does and opens them; those given as None are left out."""

    def open_file(in_chans: int = 1, **changes: Array | None) -> Dataset:
        arrays: dict[str, Array | None] = {
            "train_images": pixels(0, 6, 28, 28),
            "train_labels": labels(0, 2, 1, 2, 0, 1),
            "val_images": pixels(1, 3, 28, 28),
            "val_labels": labels(0, 1, 2),
            "test_images": pixels(2, 4, 28, 28),
            "test_labels": labels(2, 2, 0, 1),
            **changes,
        }
        path = tmp_path / "set.npz"
        np.savez_compressed(path, **{name: array for name, array in arrays.items() if array is not None})
        return open_dataset(DataConfig(dataset="medmnist", path=path), in_chans)

    return open_file


def stack_of(source: Source) -> torch.Tensor:
    assert source.stack is not None
    return source.stack


def test_grey_images(open_arrays: Callable[..., Dataset]) -> None:
    dataset = open_arrays()
    assert torch.equal(stack_of(dataset.train), torch.from_numpy(pixels(0, 6, 28, 28))[:, None])
    assert dataset.train.labels is not None and dataset.train.labels.tolist() == [0, 2, 1, 2, 0, 1]
    assert dataset.train.labels.dtype == torch.int64 and dataset.num_classes == 3
    assert list(dataset.train.keys) == [f"train/00000{number}" for number in range(6)]
    assert dataset.open_test is not None
    test = dataset.open_test()
    assert torch.equal(stack_of(test), torch.from_numpy(pixels(2, 4, 28, 28))[:, None])
    assert test.labels is not None and test.labels.tolist() == [2, 2, 0, 1]
    assert test.keys[3] == "test/000003" and len(test) == 4


def test_the_test_part_is_read_when_asked_for_and_the_validation_part_never(
    open_arrays: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = medmnist._read

    def record(path: Path, name: str) -> Array:
        read.append(name)
        return original(path, name)

    monkeypatch.setattr(medmnist, "_read", record)
    dataset = open_arrays()
    assert sorted(read) == ["train_images", "train_labels"]
    assert dataset.open_test is not None
    dataset.open_test()
    assert sorted(read[2:]) == ["test_images", "test_labels"]


@pytest.mark.parametrize("side", [28, 64])
def test_colours(open_arrays: Callable[..., Dataset], monkeypatch: pytest.MonkeyPatch, side: int) -> None:
    monkeypatch.setattr(medmnist, "_CHUNK", 2 * side**2)  # two images at once, then a last one
    images = pixels(3, 5, side, side, 3)
    changes = {"train_images": images, "train_labels": labels(0, 1, 0, 1, 0)}
    colour = open_arrays(3, **changes)
    assert torch.equal(stack_of(colour.train), torch.from_numpy(images).permute(0, 3, 1, 2))
    assert stack_of(colour.train).is_contiguous() and len(colour.mean) == 3
    grey = open_arrays(1, **changes)
    expected = [np.asarray(Image.fromarray(image).convert("L")) for image in images]
    assert np.array_equal(stack_of(grey.train)[:, 0].numpy(), np.stack(expected))
    assert len(grey.mean) == 1


def test_grey_becomes_the_colour_of_equal_channels(open_arrays: Callable[..., Dataset]) -> None:
    stack = stack_of(open_arrays(3).train)
    assert stack.shape == (6, 3, 28, 28)
    for channel in range(3):
        assert torch.equal(stack[:, channel], torch.from_numpy(pixels(0, 6, 28, 28)))


def test_fortran_order(open_arrays: Callable[..., Dataset]) -> None:
    images = pixels(4, 6, 8, 8, 3)
    stack = stack_of(open_arrays(3, train_images=np.asfortranarray(images)).train)
    assert torch.equal(stack, torch.from_numpy(images).permute(0, 3, 1, 2))


def test_several_labels_per_image_count_as_none(open_arrays: Callable[..., Dataset]) -> None:
    dataset = open_arrays(
        train_labels=np.zeros((6, 14), dtype=np.uint8), test_labels=np.zeros((4, 14), dtype=np.uint8)
    )
    assert dataset.train.labels is None and dataset.num_classes is None
    assert dataset.open_test is not None and dataset.open_test().labels is None


def test_images_alone(open_arrays: Callable[..., Dataset]) -> None:
    nothing = dict.fromkeys(["train_labels", "val_images", "val_labels", "test_images", "test_labels"])
    dataset = open_arrays(**nothing)
    assert len(dataset.train) == 6 and dataset.train.labels is None
    assert dataset.num_classes is None and dataset.open_test is None


def test_some_labels(open_arrays: Callable[..., Dataset]) -> None:
    partly = open_arrays(train_labels=np.array([0, -1, 1, -1, -1, 2]))
    assert partly.train.labels is not None and partly.train.labels.tolist() == [0, -1, 1, -1, -1, 2]
    assert partly.num_classes == 3
    assert open_arrays(train_labels=np.full((6, 1), -1), test_labels=None).train.labels is None


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"train_images": None}, r"arrays test_images, test_labels, .*; expected train_images$"),
        (
            {"train_images": pixels(0, 6, 28, 28, 28)},
            r"are uint8 \[6, 28, 28, 28\]; expected .*2-D images only",
        ),
        ({"train_images": np.zeros((6, 8, 8))}, r"train_images are float64 \[6, 8, 8\]; expected uint8"),
        ({"train_images": pixels(0, 0, 8, 8)}, r"train_images are uint8 \[0, 8, 8\]; expected"),
        ({"train_labels": labels(0, 1)}, r"train_labels are uint8 \[2, 1\]; expected class numbers \[6, 1\]"),
        ({"train_labels": np.zeros((6, 1))}, r"train_labels are float64 \[6, 1\]; expected class numbers"),
        ({"train_labels": np.full(6, -2)}, r"train_labels hold -2; expected class numbers, -1 for none"),
        ({"train_labels": np.array([None] * 6)}, r"train_labels cannot be read \(.*allow_pickle.*\); copy"),
        ({"test_labels": None}, r"has test_images and train_labels, but no test_labels; add them"),
    ],
)
def test_unusable_arrays(open_arrays: Callable[..., Dataset], changes: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_arrays(**changes)
    assert "set.npz: " in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"test_labels": labels(0, 1, 3, 1)}, r"test_labels hold 3, expected 0 to 2 \(the classes of train"),
        ({"test_labels": np.array([0, -1, 1, 1])}, r"test_labels hold -1, expected 0 to 2"),
        (
            {"test_labels": np.zeros((4, 2), dtype=np.uint8)},
            r"test_labels hold no class numbers \[N, 1\], but",
        ),
        ({"test_labels": labels(0)}, r"test_labels are uint8 \[1, 1\]; expected class numbers \[4, 1\]"),
        ({"test_images": pixels(0, 4, 8, 8, 2)}, r"test_images are uint8 \[4, 8, 8, 2\]; expected uint8"),
    ],
)
def test_unusable_test_arrays(open_arrays: Callable[..., Dataset], changes: Any, message: str) -> None:
    dataset = open_arrays(**changes)
    assert dataset.open_test is not None
    with pytest.raises(UserError, match=message):
        dataset.open_test()


def test_damaged_files(tmp_path: Path, open_arrays: Callable[..., Dataset]) -> None:
    open_arrays()
    path = tmp_path / "set.npz"
    good = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("train_images.npy").header_offset
    flipped = bytearray(good)
    flipped[offset + 1000] ^= 0xFF
    no_block = bytearray(good)
    no_block[offset + 30 + sum(struct.unpack_from("<HH", good, offset + 26))] = 0x07
    encrypted = bytearray(good)
    encrypted[good.index(b"PK\x01\x02") + 8] |= 1
    for content, message in (
        (good[:-30], r"set\.npz: not a complete \.npz file \(.+\); copy it again"),
        (b"", r"set\.npz: not a complete \.npz file"),
        (bytes(flipped), r"set\.npz: train_images cannot be read \(.+\); copy the file again"),
        (bytes(no_block), r"set\.npz: train_images cannot be read \(.*invalid block type\)"),
        (bytes(encrypted), r"set\.npz: train_images cannot be read \(.*encrypted.*\)"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message) as caught:
            open_dataset(DataConfig(dataset="medmnist", path=path), 1)
        assert "\n" not in str(caught.value)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train_images.npy", b"text")
    with pytest.raises(UserError, match=r"train_images cannot be read \(no array\)"):
        open_dataset(DataConfig(dataset="medmnist", path=path), 1)
