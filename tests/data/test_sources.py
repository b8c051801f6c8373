from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlomae.data.dataset import Dataset
from mlomae.data.faults import BadSample
from mlomae.data.sources import open_dataset
from mlomae.errors import UserError
from mlomae.sections import DataConfig


def open_folder(path: Path, in_chans: int = 3) -> Dataset:
    return open_dataset(DataConfig(dataset="folder", path=path), in_chans)


def test_digits() -> None:
    dataset = open_dataset(DataConfig(), 1)
    train = dataset.train
    assert len(train) == 1797 and train.stack is not None and train.labels is not None
    assert train.stack.shape == (1797, 1, 8, 8) and train.stack.dtype == torch.uint8
    assert train.stack.min() == 0 and train.stack.max() == 255
    assert train.labels.bincount().numel() == dataset.num_classes == 10
    assert train.keys[7] == "digits/0007" and len(set(train.keys)) == 1797
    scaled = train.stack / 255
    assert (scaled.mean().item(), scaled.std().item()) == pytest.approx(
        (*dataset.mean, *dataset.std), abs=1e-3
    )


class FakeCifar:
    """Stands in for torchvision's CIFAR classes."""

    opened: list[bool]

    def __init__(self, root: Path, train: bool = True, download: bool = False) -> None:
        self.opened.append(train)
        rng = np.random.default_rng(int(train))
        self.data = rng.integers(0, 256, (20 if train else 10, 32, 32, 3), dtype=np.uint8)
        self.targets = [index % 10 for index in range(len(self.data))]


@pytest.mark.parametrize("name, classes", [("cifar10", 10), ("cifar100", 100)])
def test_cifar_leaves_its_test_part_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: Any, classes: int
) -> None:
    monkeypatch.setattr(FakeCifar, "opened", [], raising=False)
    monkeypatch.setattr(f"torchvision.datasets.{name.upper()}", FakeCifar)
    dataset = open_dataset(DataConfig(dataset=name, path=tmp_path), 3)
    assert FakeCifar.opened == [True]
    assert dataset.num_classes == classes and dataset.train.keys[3] == f"{name}/train/00003"
    expected = torch.from_numpy(FakeCifar(tmp_path).data[4]).permute(2, 0, 1)
    assert dataset.train.stack is not None and torch.equal(dataset.train.stack[4], expected)
    assert dataset.open_test is not None
    test = dataset.open_test()
    assert len(test) == 10 and test.keys[0] == f"{name}/test/00000" and FakeCifar.opened[-1] is False


def test_missing_cifar(tmp_path: Path) -> None:
    message = (
        f"data.path: no CIFAR-10 in {tmp_path}; put torchvision's copy of it there or set data.download=true"
    )
    with pytest.raises(UserError, match=re.escape(message)):
        open_dataset(DataConfig(dataset="cifar10", path=tmp_path), 3)


def test_failed_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no\nroute")

    monkeypatch.setattr("torchvision.datasets.CIFAR100", refuse)
    with pytest.raises(
        UserError, match=r"data\.download: cannot fetch cifar100 into .* \(no route\); put it there"
    ):
        open_dataset(DataConfig(dataset="cifar100", path=tmp_path, download=True), 3)


@pytest.mark.parametrize("name, in_chans, right", [("digits", 3, 1), ("cifar10", 1, 3), ("cifar100", 4, 3)])
def test_wrong_channels_of_fixed_data_sets(tmp_path: Path, name: Any, in_chans: int, right: int) -> None:
    message = rf"model\.in_chans: found {in_chans}, but {name} has {right}; set model\.in_chans={right}"
    with pytest.raises(UserError, match=message):
        open_dataset(DataConfig(dataset=name, path=tmp_path), in_chans)


@pytest.mark.parametrize("name", ["folder", "shards"])
def test_wrong_channels_of_files(tmp_path: Path, name: Any) -> None:
    with pytest.raises(UserError, match=r"model\.in_chans: 2 does not suit image files; use 3 .* or 1"):
        open_dataset(DataConfig(dataset=name, path=tmp_path), 2)


def test_folder_with_classes(tmp_path: Path, fill_folder: Callable[..., None]) -> None:
    fill_folder(tmp_path / "train" / "dog", 2)
    fill_folder(tmp_path / "train" / "cat" / "deep", 3, first_seed=5)
    fill_folder(tmp_path / "train" / ".hidden", 1)
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / "empty").mkdir()
    fill_folder(tmp_path / "test" / "dog", 1, first_seed=9)
    dataset = open_folder(tmp_path)
    deep = [f"cat/deep/{number}.png" for number in range(3)]
    assert list(dataset.train.keys) == [*deep, "dog/0.png", "dog/1.png"]
    assert dataset.train.labels is not None and dataset.train.labels.tolist() == [0, 0, 0, 1, 1]
    assert dataset.num_classes == 2
    assert dataset.open_test is not None
    test = dataset.open_test()
    assert test.labels is not None and test.labels.tolist() == [1]
    assert dataset.train.content(3) == (tmp_path / "train" / "dog" / "0.png").read_bytes()
    assert test.content(0) == (tmp_path / "test" / "dog" / "0.png").read_bytes()


def test_flat_folder_is_unlabelled(tmp_path: Path, fill_folder: Callable[..., None]) -> None:
    fill_folder(tmp_path, 3)
    dataset = open_folder(tmp_path)
    assert list(dataset.train.keys) == ["0.png", "1.png", "2.png"]
    assert dataset.train.labels is None and dataset.num_classes is None and dataset.open_test is None


def test_folder_prefers_test_over_val(tmp_path: Path, fill_folder: Callable[..., None]) -> None:
    fill_folder(tmp_path / "train", 2)
    fill_folder(tmp_path / "val", 3, first_seed=10)
    dataset = open_folder(tmp_path)
    assert dataset.open_test is not None and len(dataset.open_test()) == 3
    fill_folder(tmp_path / "test", 4, first_seed=20)
    dataset = open_folder(tmp_path)
    assert dataset.open_test is not None and len(dataset.open_test()) == 4


@pytest.mark.parametrize(
    "folders, message",
    [
        ([], r"data\.path: no images in .*; expected files ending in \.jpg"),
        (
            ["train/a", "train"],
            r"data\.path: .*train holds class folders and also 1 images outside .* 0\.png",
        ),
        (["a", "val/a"], r"data\.path: .* has a folder 'val' but no 'train'; add or rename it"),
        (
            ["train/a", "test/b"],
            r"data\.path: .*test has class folder 'b'; expected the 1 class folders of training",
        ),
        (["train/a", "test"], r"data\.path: .*test has images outside class folders; expected the 1 class"),
    ],
)
def test_unusable_folders(
    tmp_path: Path, fill_folder: Callable[..., None], folders: list[str], message: str
) -> None:
    for folder in folders:
        fill_folder(tmp_path / folder, 1)
    with pytest.raises(UserError, match=message):
        open_folder(tmp_path)


@pytest.mark.parametrize("name", ["folder", "shards"])
def test_missing_folder(tmp_path: Path, name: Any) -> None:
    with pytest.raises(UserError, match=r"data\.path: .*nowhere is not a folder; give the folder"):
        open_dataset(DataConfig(dataset=name, path=tmp_path / "nowhere"), 3)


@pytest.mark.parametrize("name", ["csv", "medmnist"])
def test_missing_file(tmp_path: Path, name: Any) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=rf"data\.path: {path} is not a file; give the "):
            open_dataset(DataConfig(dataset=name, path=path), 3)


@pytest.mark.parametrize("name", ["unlabelled", "unlabeled"])
def test_a_folder_of_unlabelled_images(tmp_path: Path, fill_folder: Callable[..., None], name: str) -> None:
    fill_folder(tmp_path / "train" / "ant", 1)
    fill_folder(tmp_path / "train" / "zebra", 2)
    fill_folder(tmp_path / "train" / name / "deep", 3)
    dataset = open_folder(tmp_path)
    assert dataset.num_classes == 2 and dataset.train.labels is not None
    assert [key.split("/")[0] for key in dataset.train.keys] == ["ant", name, name, name, "zebra", "zebra"]
    assert dataset.train.labels.tolist() == [0, -1, -1, -1, 1, 1]
    fill_folder(tmp_path / "test" / name, 1)
    with pytest.raises(UserError, match=rf"test has class folder '{name}'; expected the 2 class folders"):
        open_folder(tmp_path)


def test_a_folder_of_unlabelled_images_alone_has_no_classes(
    tmp_path: Path, fill_folder: Callable[..., None]
) -> None:
    fill_folder(tmp_path / "unlabelled", 2)
    fill_folder(tmp_path, 1)
    dataset = open_folder(tmp_path)
    assert len(dataset.train) == 3 and dataset.train.labels is None and dataset.num_classes is None


def test_files_that_cannot_be_read(tmp_path: Path, fill_folder: Callable[..., None]) -> None:
    fill_folder(tmp_path, 2)
    train = open_folder(tmp_path).train
    (tmp_path / "1.png").unlink()
    (tmp_path / "1.png").mkdir()
    with pytest.raises(BadSample, match=r"cannot be read \(Is a directory\)") as caught:
        train.content(1)
    assert caught.value.kind == "unreadable"


def test_images_in_memory_have_no_file() -> None:
    with pytest.raises(TypeError, match="digits/0003 lies decoded in the stack"):
        open_dataset(DataConfig(), 1).train.content(3)
