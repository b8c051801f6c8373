"""Augmentation of an image together with its label map, drawn from one seed per sample."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mlomae.data.dataset import VOID
from mlomae.sections import Section

# A crop of which one class fills more than this is drawn again, at most so many times.
MAX_CLASS_SHARE, MAX_DRAWS = 0.75, 10


class AugmentConfig(Section):
    """How training images are varied; crops have the size ``img_size``."""

    scale: tuple[float, float] = Field(
        (0.5, 2.0), description="range of sizes before the crop; at 1 the image just covers the crop"
    )
    flip: bool = Field(True, description="mirror every other image")
    colour: float = Field(
        0.5,
        ge=0,
        le=1,
        description="strength of changes of contrast, saturation, brightness and hue; 0: none",
    )

    @model_validator(mode="after")
    def _check(self) -> AugmentConfig:
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale {list(self.scale)} is no range of positive numbers [lowest, highest]")
        return self


def scaled(shape: Sequence[int], size: tuple[int, int], scale: float) -> tuple[int, int]:
    """(height, width) of an image resized from ``shape``, keeping it, to cover ``scale`` times ``size``."""
    height, width = shape
    factor = scale * max(size[0] / height, size[1] / width)
    return max(1, round(height * factor)), max(1, round(width * factor))


def resize_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [C, H, W] → [C, h, w], bilinear with antialiasing."""
    from torchvision.transforms.v2 import InterpolationMode, functional

    resized: Tensor = functional.resize(
        image, list(size), interpolation=InterpolationMode.BILINEAR, antialias=True
    )
    return resized


def augment_scene(
    image: Tensor,
    labels: Tensor,
    size: tuple[int, int],
    mean: tuple[float, ...],
    config: AugmentConfig,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Resizes, crops and mirrors an image and its map alike, then changes the image's colours.

    Where the resized image is smaller than the crop it is filled up, with the mean colour and with VOID.

    Args:
        image: uint8 [C, H, W].
        labels: uint8 [H, W].
        size: (h, w) of the crop.
        mean: per channel, of values in [0, 1].
        seed: the result is a function of it and of what is given.

    Returns:
        uint8 [C, h, w] and uint8 [h, w].
    """
    from torchvision import tv_tensors

    crop, vary = _transforms(size, mean, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        low, high = config.scale
        target = scaled(labels.shape, size, low + (high - low) * float(torch.rand(())))
        pair = (
            tv_tensors.Image(resize_image(image, target)),
            tv_tensors.Mask(_resize_labels(labels, target)),
        )
        for _ in range(MAX_DRAWS):
            cropped = crop(*pair)
            if _largest_share(cropped[1]) <= MAX_CLASS_SHARE:
                break
        varied, moved = vary(*cropped)
    return varied.as_subclass(Tensor), moved.as_subclass(Tensor)


@lru_cache(maxsize=4)
def _transforms(size: tuple[int, int], mean: tuple[float, ...], config: AugmentConfig) -> tuple[Any, Any]:
    """The crop, and what follows it."""
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    fill = {tv_tensors.Image: [round(255 * value) for value in mean], tv_tensors.Mask: VOID}
    crop = v2.RandomCrop(size, pad_if_needed=True, fill=fill)
    c = config.colour
    colour = v2.ColorJitter(brightness=c / 4, contrast=c, saturation=c, hue=c / 10)
    return crop, v2.Compose([v2.RandomHorizontalFlip(0.5 if config.flip else 0.0), colour])


def _resize_labels(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """uint8 [H, W] → [h, w]: the label at the centre of each new pixel, as images are resized about it."""
    resized = torch.nn.functional.interpolate(labels[None, None], size=size, mode="nearest-exact")
    return resized[0, 0]


def _largest_share(labels: Tensor) -> float:
    """Of the most frequent class among the pixels that count."""
    counts = torch.bincount(labels.as_subclass(Tensor).flatten().long(), minlength=VOID + 1)[:VOID]
    return int(counts.max()) / max(int(counts.sum()), 1)
