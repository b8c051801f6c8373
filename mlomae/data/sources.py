"""Opens the data set that a configuration names."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import ValidationError

from mlomae.data.csv_table import open_csv
from mlomae.data.dataset import STATISTICS, Dataset, PartFiles, Source, TensorSource
from mlomae.data.decoding import MODES
from mlomae.data.folder import FilesSource, class_labels, find_classes, list_images
from mlomae.data.ledger import FaultLedger
from mlomae.data.medmnist import open_medmnist
from mlomae.data.published import open_published
from mlomae.data.scenes import ScenesConfig, open_scenes
from mlomae.data.shards.sets import open_shards
from mlomae.data.shards.source import ShardSource
from mlomae.errors import UserError
from mlomae.sections import DataConfig, ImagesConfig


def open_dataset(data: ImagesConfig, in_chans: int) -> Dataset:
    """Opens the training part; nothing of a test part is read beyond its file names.

    Raises:
        UserError: the data is missing or damaged, or ``in_chans`` does not suit it.
    """
    if data.dataset == "digits":
        return _open_digits(in_chans)
    assert data.path is not None, "ImagesConfig requires it"
    path = Path(data.path)
    if data.dataset in ("cifar10", "cifar100"):
        return _open_cifar(data.dataset, path, data.download, in_chans)
    if in_chans not in MODES:
        raise UserError(f"model.in_chans: {in_chans} does not suit image files; use 3 (colour) or 1 (grey)")
    if data.dataset == "shards":
        return open_shards(data, in_chans)
    if data.dataset == "scenes":
        assert isinstance(data, DataConfig), "ImagesConfig refuses them"
        return _open_scenes(data, in_chans)
    if data.dataset in ("folder", "cub200", "cars", "inat2019"):
        if not path.is_dir():
            raise UserError(f"data.path: {path} is not a folder; give the folder that holds the images")
        if data.dataset == "folder":
            return _open_folder(path, in_chans)
        return open_published(data.dataset, path, in_chans)
    if not path.is_file():
        wanted = "the table of image paths" if data.dataset == "csv" else "the .npz file"
        raise UserError(f"data.path: {path} is not a file; give {wanted}")
    return (open_csv if data.dataset == "csv" else open_medmnist)(path, in_chans)


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
    train = FilesSource(root, names, class_labels(root, names, classes, partial=True))
    num_classes = None if classes is None else len(classes)
    statistics = STATISTICS[MODES[in_chans]]
    class_names = None if classes is None else tuple(classes)
    if test_root is None:
        return Dataset(train, num_classes, *statistics, class_names=class_names)
    test_names = list_images(test_root)
    test = FilesSource(test_root, test_names, class_labels(test_root, test_names, classes))
    return Dataset(
        train,
        num_classes,
        *statistics,
        open_test=lambda: test,
        files=(PartFiles(root, names), PartFiles(test_root, test_names)),
        class_names=class_names,
    )


def _open_scenes(data: DataConfig, in_chans: int) -> Dataset:
    fields = ("path", "train", "test", "num_classes", "first_label", "void")
    try:
        config = ScenesConfig(**{name: getattr(data, name) for name in fields})
    except ValidationError as error:
        raise UserError(f"data: {error.errors()[0]['ctx']['error']}") from None
    train = open_scenes(config, config.train)
    images, maps = (Path(str(data.path)) / kind / data.test for kind in ("images", "annotations"))
    for folder in (images, maps):
        if not folder.is_dir():
            raise UserError(f"data.test: {folder} is not a folder; name one of {images.parent} to test on")
    return Dataset(
        train,
        config.num_classes,
        *STATISTICS[MODES[in_chans]],
        open_test=lambda: open_scenes(config, config.test),
        files=(train.files, PartFiles(images, list_images(images))),
    )


def open_account(ledger: FaultLedger, source: Source) -> None:
    """Expects a part's samples, and takes down the bad ones that its shards' headers showed.

    Raises:
        UserError: too many samples are bad.
    """
    faults = source.index.faults if isinstance(source, ShardSource) else ()
    ledger.expect(len(source) + len(faults))
    ledger.add(faults)
