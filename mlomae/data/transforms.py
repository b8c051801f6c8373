"""Augmentation as a pure function of decoded images and rows of uniform numbers.

Letters: B batch, C channels, H and W the height and width given, h and w those wanted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

Augment = Literal["none", "shift", "crop-flip", "resized-crop"]

NUM_UNIFORMS = 5  # per image: top, left, flip, area, aspect ratio
MIN_AREA = 0.2
MAX_RATIO = 4 / 3


def augment(kind: Augment, images: Tensor | Iterable[Tensor], u: Tensor, size: tuple[int, int]) -> Tensor:
    """Augments images to one size; the result for an image depends on that image and its row of u only.

    none: shorter side resized to fit, centre crop (nothing where the size is right already).
    shift: the same, then a translation by -1, 0 or 1 pixel with repeated edges.
    crop-flip: the same, then a crop of the image reflected by 1/8 of each side, and a flip.
    resized-crop: a box of 20-100 % of the area resized to ``size``, and a flip. The area is uniform;
    the aspect ratio is log-uniform between 3/4 and 4/3 as far as the box fits into the image.

    Args:
        images: uint8 [B, C, H, W], or B images [C, H, W] of any sizes.
        u: float32 [B, NUM_UNIFORMS] in the open interval (0, 1).
        size: (h, w).

    Returns:
        uint8 [B, C, h, w].
    """
    if kind == "resized-crop":
        return torch.stack(
            [_resized_crop(image, row, size) for image, row in zip(images, u.tolist(), strict=True)]
        )
    if isinstance(images, Tensor):
        fitted = _fit(images, size)
    else:
        fitted = torch.stack([_fit(image, size) for image in images])
    if kind == "shift":
        return _shift(fitted, u)
    if kind == "crop-flip":
        return _crop_flip(fitted, u)
    return fitted


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [B, C, H, W] → float32 (x / 255 - mean) / std per channel."""
    shift, scale = (_channels(values, images.device) for values in (mean, std))
    return images.to(torch.float32).div_(255).sub_(shift).div_(scale)


@lru_cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [C, 1, 1]; cached because a copy to a GPU would make every step wait."""
    return torch.tensor(values, device=device)[:, None, None]


def _fit(images: Tensor, size: tuple[int, int]) -> Tensor:
    height, width = images.shape[-2:]
    if (height, width) == size:
        return images
    from torchvision.transforms.v2 import InterpolationMode, functional

    scale = max(size[0] / height, size[1] / width)
    covering = [max(size[0], round(height * scale)), max(size[1], round(width * scale))]
    resized: Tensor = functional.resize(
        images, covering, interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    cropped: Tensor = functional.center_crop(resized, list(size))
    return cropped


def _shift(images: Tensor, u: Tensor) -> Tensor:
    rows, columns = (_window(u[:, axis], 1, images.shape[2 + axis]) for axis in (0, 1))
    return _gather(images, rows.clamp(0, images.shape[2] - 1), columns.clamp(0, images.shape[3] - 1))


def _crop_flip(images: Tensor, u: Tensor) -> Tensor:
    rows, columns = (
        _reflect(_window(u[:, axis], side // 8, side), side) for axis, side in enumerate(images.shape[2:])
    )
    columns = torch.where(u[:, 2:3] < 0.5, columns.flip(1), columns)
    return _gather(images, rows, columns)


def _window(u: Tensor, reach: int, side: int) -> Tensor:
    """[B] → [B, side]: pixel positions, moved by a whole number between -reach and reach."""
    offset = (u * (2 * reach + 1)).long() - reach
    return offset[:, None] + torch.arange(side, device=u.device)


def _reflect(position: Tensor, side: int) -> Tensor:
    last = side - 1
    return last - (last - position.abs()).abs()


def _gather(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Pixels at rows [B, h] x columns [B, w] of [B, C, H, W]."""
    pixels = (rows[:, :, None] * images.shape[3] + columns[:, None, :]).flatten(1)
    picked = images.flatten(2).gather(2, pixels[:, None].expand(-1, images.shape[1], -1))
    return picked.view(*images.shape[:2], rows.shape[1], columns.shape[1])


def _resized_crop(image: Tensor, u: list[float], size: tuple[int, int]) -> Tensor:
    from torchvision.transforms.v2 import InterpolationMode, functional

    height, width = crop_box(image.shape[-2], image.shape[-1], u[3], u[4])
    top = int(u[0] * (image.shape[-2] - height + 1))
    left = int(u[1] * (image.shape[-1] - width + 1))
    crop: Tensor = functional.resized_crop(
        image, top, left, height, width, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True
    )
    return crop.flip(-1) if u[2] < 0.5 else crop


def crop_box(height: int, width: int, area_u: float, ratio_u: float) -> tuple[int, int]:
    """(height, width) of the random box of resized-crop, drawn without rejection."""
    area = (MIN_AREA + (1 - MIN_AREA) * area_u) * height * width
    # Ratios (width / height) at which a box of this area is as tall, and as wide, as the image.
    low, high = (
        math.log(min(max(bound, 1 / MAX_RATIO), MAX_RATIO)) for bound in (area / height**2, width**2 / area)
    )
    ratio = math.exp(low + (high - low) * ratio_u)
    area = min(area, height**2 * ratio, width**2 / ratio)  # a very long image holds no larger box
    return max(1, round(math.sqrt(area / ratio))), max(1, round(math.sqrt(area * ratio)))
