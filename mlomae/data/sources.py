"""Data sets as indexable parts. A test part is opened only when asked for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mlomae.config import DataConfig
from mlomae.data.folder import FolderSource, find_classes, list_images
from mlomae.data.images import MODES
from mlomae.data.shards import ShardSource, list_shards
from mlomae.errors import UserError

# Channel means and standard deviations of values in [0, 1].
STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "digits": ((0.305,), (0.376,)),
    "cifar10": ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
    "cifar100": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
    "L": ((0.449,), (0.226,)),  # photographs in grey
    "RGB": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # photographs (ImageNet)
}


class Source(Protocol):
    """One indexable part of a data set."""

    @property
    def keys(self) -> Sequence[str]:
        """Stable, unique names of the samples."""

    @property
    def labels(self) -> Tensor | None:
        """int64 [N], or None when the samples have no labels."""

    @property
    def stack(self) -> Tensor | None:
        """uint8 [N, C, H, W] when all images lie in memory at one size."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> Tensor:
        """Decodes one sample: uint8 [C, H, W]."""


@dataclass(frozen=True)
class TensorSource:
    """Images of one size, in memory."""

    keys: Sequence[str]
    stack: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> Tensor:
        return self.stack[index]


@dataclass(frozen=True)
class PartFiles:
    """The files behind a part: names relative to ``root``, either images or whole shards."""

    root: Path
    names: Sequence[str]
    shards: bool = False


@dataclass(frozen=True)
class Dataset:
    """A data set: its training part, and how to open its test part where it has one of its own."""

    train: Source
    num_classes: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    open_test: Callable[[], Source] | None = None
    files: tuple[PartFiles, PartFiles] | None = None  # of training and of test, where both are known


def open_dataset(data: DataConfig, in_chans: int) -> Dataset:
    """Opens the training part; nothing of a test part is read beyond its file names.

    Raises:
        UserError: the data is missing or damaged, or ``in_chans`` does not suit it.
    """
    if data.dataset == "digits":
        return _open_digits(in_chans)
    assert data.path is not None, "DataConfig requires it"
    if data.dataset in ("cifar10", "cifar100"):
        return _open_cifar(data.dataset, data.path, data.download, in_chans)
    if in_chans not in MODES:
        raise UserError(f"model.in_chans: {in_chans} does not suit image files; use 3 (colour) or 1 (grey)")
    if not data.path.is_dir():
        raise UserError(f"data.path: {data.path} is not a folder; give the folder that holds the images")
    opener = _open_folder if data.dataset == "folder" else _open_shards
    return opener(data.path, in_chans)


def _require_channels(name: str, in_chans: int) -> None:
    channels = len(STATISTICS[name][0])
    if in_chans != channels:
        raise UserError(
            f"model.in_chans: found {in_chans}, but {name} has {channels}; set model.in_chans={channels}"
        )


def _open_digits(in_chans: int) -> Dataset:
    from sklearn.datasets import load_digits

    _require_channels("digits", in_chans)
    images, labels = load_digits(return_X_y=True)
    stack = (torch.from_numpy(images).reshape(-1, 1, 8, 8) * (255 / 16)).round().to(torch.uint8)
    keys = [f"digits/{index:04d}" for index in range(len(stack))]
    train = TensorSource(keys, stack, torch.from_numpy(labels).long())
    return Dataset(train, 10, *STATISTICS["digits"])


def _open_cifar(name: str, path: Path, download: bool, in_chans: int) -> Dataset:
    _require_channels(name, in_chans)
    if download:
        _download_cifar(name, path)
    train = _cifar_part(name, path, train=True)
    return Dataset(
        train,
        {"cifar10": 10, "cifar100": 100}[name],
        *STATISTICS[name],
        open_test=lambda: _cifar_part(name, path, train=False),
    )


def _download_cifar(name: str, path: Path) -> None:
    import fcntl

    from torchvision import datasets

    try:
        path.mkdir(parents=True, exist_ok=True)
        with (path / ".download.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # ranks of one machine must not write the same archive at once
            getattr(datasets, name.upper())(path, download=True)
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"data.download: cannot fetch {name} into {path} ({reason}); put it there by hand"
        ) from None


def _cifar_part(name: str, path: Path, train: bool) -> TensorSource:
    from torchvision import datasets

    title = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100"}[name]
    try:
        part = getattr(datasets, name.upper())(path, train=train)
    except (OSError, RuntimeError):
        raise UserError(
            f"data.path: no {title} in {path}; put torchvision's copy of it there or set data.download=true"
        ) from None
    keys = [f"{name}/{'train' if train else 'test'}/{index:05d}" for index in range(len(part.data))]
    stack = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
    return TensorSource(keys, stack, torch.tensor(part.targets))


def _open_folder(path: Path, in_chans: int) -> Dataset:
    root = path / "train"
    test_root = next((path / part for part in ("test", "val") if (path / part).is_dir()), None)
    if not root.is_dir():
        if test_root is not None:
            raise UserError(
                f"data.path: {path} has a folder {test_root.name!r} but no 'train'; add or rename it"
            )
        root = path
    names = list_images(root)
    classes = find_classes(root, names)
    train = FolderSource(root, names, classes, in_chans)
    num_classes = None if classes is None else len(classes)
    statistics = STATISTICS[MODES[in_chans]]
    if test_root is None:
        return Dataset(train, num_classes, *statistics)
    test_names = list_images(test_root)
    test = FolderSource(test_root, test_names, classes, in_chans)  # reads names only
    return Dataset(
        train,
        num_classes,
        *statistics,
        open_test=lambda: test,
        files=(PartFiles(root, names), PartFiles(test_root, test_names)),
    )


def _open_shards(path: Path, in_chans: int) -> Dataset:
    names = list_shards(path, "train")
    if not names:
        raise UserError(f"data.path: no train-*.tar in {path}; give the folder that holds the shards")
    train = ShardSource(path, names, in_chans)
    num_classes = None if train.labels is None else _count_classes(path, train.labels)
    statistics = STATISTICS[MODES[in_chans]]
    test_names = list_shards(path, "test") or list_shards(path, "val")
    if not test_names:
        return Dataset(train, num_classes, *statistics)

    def open_test() -> Source:
        test = ShardSource(path, test_names, in_chans)
        if num_classes is not None:
            if test.labels is None:
                raise UserError(
                    f"{path / test_names[0]}: has no labels, but the training shards have; add them"
                )
            _require_known(path / test_names[0], test.labels, num_classes)
        return test

    files = PartFiles(path, names, shards=True), PartFiles(path, test_names, shards=True)
    return Dataset(train, num_classes, *statistics, open_test=open_test, files=files)


def _count_classes(path: Path, labels: Tensor) -> int:
    listing = path / "classes.json"
    if not listing.exists():
        return int(labels.max()) + 1
    try:
        classes = json.loads(listing.read_text())
    except (OSError, ValueError):
        classes = None
    if not isinstance(classes, list) or not classes:
        raise UserError(f"{listing}: not a JSON list of class names; correct or remove it")
    _require_known(path, labels, len(classes))
    return len(classes)


def _require_known(where: Path, labels: Tensor, num_classes: int) -> None:
    highest = int(labels.max())
    if highest >= num_classes:
        raise UserError(
            f"{where}: found label {highest}, expected 0 to {num_classes - 1} (the known classes)"
        )
