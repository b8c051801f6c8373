"""Augmentation as a pure function of images and rows of uniform numbers.

Letters: B batch, C channels, H and W the height and width given, h and w those wanted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from mlomae.data.decoding import decode_image, image_size

Augment = Literal["none", "shift", "crop-flip", "resized-crop"]

NUM_UNIFORMS = 5  # per image: top, left, flip, area, aspect ratio
MIN_AREA = 0.2
MAX_RATIO = 4 / 3


def load(
    content: bytes | Tensor, kind: Augment, u: Sequence[float], size: tuple[int, int], channels: int
) -> Tensor:
    """Decodes no more of an image than its augmentation needs, and brings it to one size.

    none, shift, crop-flip: shorter side resized to fit, centre crop (nothing where the size is right
    already). resized-crop: a box of 20-100 % of the area resized to ``size``, and a flip. The area is
    uniform; the aspect ratio is log-uniform between 3/4 and 4/3 as far as the box fits into the image.

    Args:
        content: an encoded image, or a decoded one, uint8 [C, H, W].
        u: NUM_UNIFORMS numbers in the open interval (0, 1).
        size: (h, w).
        channels: C.

    Returns:
        uint8 [C, h, w].

    Raises:
        BadSample: it cannot be decoded.
    """

    def decode(least: tuple[int, int]) -> Tensor:
        return content if isinstance(content, Tensor) else decode_image(content, channels, least)

    height, width = content.shape[1:] if isinstance(content, Tensor) else image_size(content)
    if kind == "resized-crop":
        box = _draw_box(height, width, u)
        # Reduced no further than to leave the box as many pixels as are wanted of it.
        least = math.ceil(size[0] * height / box.height), math.ceil(size[1] * width / box.width)
        return _crop(decode(least), box, (height, width), u, size)
    return fit(decode(_covering(height, width, size)), size)


def load_map(labels: Tensor, kind: Augment, u: Sequence[float], size: tuple[int, int]) -> Tensor:
    """Brings a label map to one size as ``load`` does its image; pixels take the label that is nearest.

    Args:
        labels: uint8 [H, W], of the size of the image.
        u, size: as for the image.

    Returns:
        uint8 [h, w].
    """
    height, width = labels.shape
    if kind == "resized-crop":
        box = _draw_box(height, width, u)
        return _crop(labels[None], box, (height, width), u, size, nearest=True)[0]
    return fit(labels[None], size, nearest=True)[0]


def augment_maps(kind: Augment, labels: Tensor, u: Tensor) -> Tensor:
    """The same as ``augment`` for label maps uint8 [B, h, w] of the images with these rows of u."""
    return augment(kind, labels[:, None], u)[:, 0]


def augment(kind: Augment, images: Tensor, u: Tensor) -> Tensor:
    """Augments a batch of fitted images; the result for an image depends on that image and its row of u only.

    shift: a translation by -1, 0 or 1 pixel with repeated edges.
    crop-flip: a crop of the image reflected by 1/8 of each side, and a flip.
    none, resized-crop: nothing; ``load`` has done it.

    Args:
        images: uint8 [B, C, h, w].
        u: float32 [B, NUM_UNIFORMS] in the open interval (0, 1), on the same device.
    """
    if kind == "shift":
        return _shift(images, u)
    if kind == "crop-flip":
        return _crop_flip(images, u)
    return images


def normalise(images: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """uint8 [B, C, H, W] → float32 (x / 255 - mean) / std per channel."""
    shift, scale = (_channels(values, images.device) for values in (mean, std))
    return images.to(torch.float32).div_(255).sub_(shift).div_(scale)


@lru_cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """float32 [C, 1, 1]; cached because a copy to a GPU would make every step wait."""
    return torch.tensor(values, device=device)[:, None, None]


def fit(images: Tensor, size: tuple[int, int], nearest: bool = False) -> Tensor:
    """uint8 [..., C, H, W] → [..., C, h, w]: shorter side resized to fit, centre crop."""
    height, width = images.shape[-2:]
    if (height, width) == size:
        return images
    covering = _covering(height, width, size)
    resized = _resize(images, covering, nearest)
    top, left = (round((have - want) / 2) for have, want in zip(covering, size, strict=True))
    return resized[..., top : top + size[0], left : left + size[1]]


def _covering(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """The smallest size of the same shape that covers ``size``."""
    scale = max(size[0] / height, size[1] / width)
    return max(size[0], round(height * scale)), max(size[1], round(width * scale))


def _resize(images: Tensor, size: tuple[int, int], nearest: bool = False) -> Tensor:
    """uint8 [..., C, H, W] → [..., C, h, w], bicubic with antialiasing, as in MAE's recipe.

    Args:
        nearest: every pixel takes the value that lies nearest to its centre.
    """
    from torchvision.transforms.v2 import InterpolationMode, functional

    mode = InterpolationMode.NEAREST_EXACT if nearest else InterpolationMode.BICUBIC
    resized: Tensor = functional.resize(images, list(size), interpolation=mode, antialias=True)
    return resized


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


@dataclass(frozen=True)
class _Box:
    """A part of an image, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, image: Tensor, height: int, width: int) -> Tensor:
        """The part of [C, H, W], which shows a ``height`` by ``width`` image at its own or a reduced size."""
        down, across = image.shape[-2] / height, image.shape[-1] / width
        top, bottom = (round(edge * down) for edge in (self.top, self.top + self.height))
        left, right = (round(edge * across) for edge in (self.left, self.left + self.width))
        return image[:, top : max(bottom, top + 1), left : max(right, left + 1)]


def _crop(
    image: Tensor,
    box: _Box,
    full: tuple[int, int],
    u: Sequence[float],
    size: tuple[int, int],
    nearest: bool = False,
) -> Tensor:
    """The box of an image [C, H, W], which shows one of ``full`` size, resized; flipped or not."""
    crop = _resize(box.of(image, *full), size, nearest)
    return crop.flip(-1) if u[2] < 0.5 else crop


def _draw_box(height: int, width: int, u: Sequence[float]) -> _Box:
    rows, columns = crop_box(height, width, u[3], u[4])
    return _Box(int(u[0] * (height - rows + 1)), int(u[1] * (width - columns + 1)), rows, columns)


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
