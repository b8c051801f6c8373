"""MedMNIST archives (.npz): all images of a part in one array."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mlomae.data.dataset import STATISTICS, Dataset, Source, TensorSource
from mlomae.data.decoding import MODES
from mlomae.errors import UserError

# Pillow's grey is (19595 R + 38470 G + 7471 B + 2^15) / 2^16.
LUMA = (19595, 38470, 7471)
_CHUNK = 2**22  # pixels rearranged at once

Array = npt.NDArray[Any]


def open_medmnist(path: Path, in_chans: int) -> Dataset:
    """Opens ``train_images`` with their ``train_labels``; ``test_images`` are read when they are asked for.

    Images are uint8 [N, H, W] (grey) or [N, H, W, 3] of any size and lie in memory. Labels are class
    numbers [N, 1] or [N], -1 for an image without one. A data set with several labels per image (ChestMNIST)
    or none counts as unlabelled. ``val_images`` are left for the user's own model selection: no level trains
    on them. Without ``test_images`` a test part is split off from training.

    Raises:
        UserError: the file is damaged, or an array is missing or not as above.
    """
    names = _names(path)
    if "train_images" not in names:
        found = ", ".join(sorted(names)) or "none"
        raise UserError(f"{path}: found the arrays {found[:80]}; expected train_images")
    train = _open_part(path, "train", "train_labels" in names, in_chans)
    num_classes = None if train.labels is None else int(train.labels.max()) + 1
    statistics = STATISTICS[MODES[in_chans]]
    if "test_images" not in names:
        return Dataset(train, num_classes, *statistics)
    if num_classes is not None and "test_labels" not in names:
        raise UserError(f"{path}: has test_images and train_labels, but no test_labels; add them")

    def open_test() -> Source:
        test = _open_part(path, "test", num_classes is not None, in_chans)
        if num_classes is not None:
            _verify_test_labels(path, test.labels, num_classes)
        return test

    return Dataset(train, num_classes, *statistics, open_test=open_test)


def _names(path: Path) -> frozenset[str]:
    """Names of the arrays."""
    try:
        with zipfile.ZipFile(path) as archive:
            return frozenset(name.removesuffix(".npy") for name in archive.namelist())
    except zipfile.BadZipFile as error:
        raise UserError(f"{path}: not a complete .npz file ({error}); copy it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _read(path: Path, name: str) -> Array:
    try:
        with np.load(path, allow_pickle=False) as archive:
            array: Array = archive[name]
            if not isinstance(array, np.ndarray):
                raise ValueError("no array")
    except (OSError, EOFError, RuntimeError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: {name} cannot be read ({reason}); copy the file again") from None
    return array


def _open_part(path: Path, part: str, labelled: bool, in_chans: int) -> TensorSource:
    images = _read(path, f"{part}_images")
    colour = images.ndim == 4 and images.shape[3] == 3
    if images.dtype != np.uint8 or not (images.ndim == 3 or colour) or 0 in images.shape:
        raise UserError(
            f"{path}: {part}_images are {images.dtype} {list(images.shape)}; "
            "expected uint8 [N, H, W] or [N, H, W, 3] (2-D images only)"
        )
    labels = _open_labels(path, part, len(images)) if labelled else None
    keys = [f"{part}/{index:06d}" for index in range(len(images))]
    return TensorSource(keys, _to_stack(images, in_chans), labels)


def _open_labels(path: Path, part: str, length: int) -> Tensor | None:
    """int64 [N]; None where there are several per image, or no image has one."""
    labels = _read(path, f"{part}_labels")
    if labels.dtype.kind not in "iu" or labels.ndim not in (1, 2) or len(labels) != length:
        raise UserError(
            f"{path}: {part}_labels are {labels.dtype} {list(labels.shape)}; "
            f"expected class numbers [{length}, 1], one row per image"
        )
    if labels.size != length:
        return None
    flat = torch.from_numpy(labels.reshape(length).astype(np.int64))
    if int(flat.min()) < -1:
        raise UserError(f"{path}: {part}_labels hold {int(flat.min())}; expected class numbers, -1 for none")
    return flat if int(flat.max()) >= 0 else None


def _verify_test_labels(path: Path, labels: Tensor | None, num_classes: int) -> None:
    if labels is None:
        raise UserError(f"{path}: test_labels hold no class numbers [N, 1], but train_labels do; add them")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= num_classes:
        found = low if low < 0 else high
        raise UserError(
            f"{path}: test_labels hold {found}, expected 0 to {num_classes - 1} (the classes of training)"
        )


def _to_stack(images: Array, in_chans: int) -> Tensor:
    """uint8 [N, in_chans, H, W], in the memory of ``images`` unless colours become grey."""
    if images.ndim == 3:
        return torch.from_numpy(images)[:, None].expand(-1, in_chans, -1, -1)
    count, height, width, _ = images.shape
    shape = (count, in_chans, height, width)
    stack = images.reshape(shape) if in_chans == 3 else np.empty(shape, np.uint8)
    step = max(1, _CHUNK // (height * width))
    for start in range(0, count, step):
        pixels = images[start : start + step].transpose(0, 3, 1, 2)
        stack[start : start + step] = pixels if in_chans == 3 else _to_grey(pixels)
    return torch.from_numpy(stack)


def _to_grey(pixels: Array) -> Array:
    red, green, blue = np.split(pixels.astype(np.uint32), 3, axis=1)
    return (LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue + 2**15) >> 16
