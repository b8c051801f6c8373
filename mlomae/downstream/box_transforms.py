"""Images and their boxes, brought into a frame together."""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mlomae.downstream.joint_transforms import resize_image
from mlomae.sections import Section, Share

Size = tuple[int, int]
"""(height, width) in pixels."""

LEAST = 1.0  # pixels per side of a box that is left of one at the edge of a crop


class BoxAugmentConfig(Section):
    """What a training image goes through before it is cut to the frame."""

    flip: Share = Field(0.5, description="probability of a horizontal flip")
    scale: tuple[float, float] = Field(
        (0.1, 2.0), description="range of the size relative to the frame; what does not fit is cut off"
    )
    colour: Share = Field(0.0, description="by which share brightness, contrast and saturation may change")

    @model_validator(mode="after")
    def _check(self) -> BoxAugmentConfig:
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale is {list(self.scale)}; expected two positive numbers, the smaller first")
        return self


def fit(image: Tensor, frame: Size) -> Tensor:
    """uint8 [C, H, W] at the largest size that keeps its shape and fits into ``frame``."""
    return resize_image(image, _fitting(image, frame, 1.0))


def augment(
    image: Tensor, boxes: Tensor, labels: Tensor, frame: Size, config: BoxAugmentConfig, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A random view of an image, not larger than ``frame``: a function of its arguments only.

    Args:
        image: uint8 [C, H, W].
        boxes: float32 [n, 4], left, top, right, bottom.
        labels: int64 [n].

    Returns:
        image, boxes and labels; boxes are cut to the view, and those outside of it are left out.
    """
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        factor, down, right = torch.rand(3).tolist()
        low, high = config.scale
        height, width = _fitting(image, frame, low + (high - low) * factor)
        view = min(height, frame[0]), min(width, frame[1])
        top, left = int(down * (height - view[0] + 1)), int(right * (width - view[1] + 1))
        parts = (tv_tensors.Image(image), _mark(boxes, image))
        parts = v2.ColorJitter(config.colour, config.colour, config.colour)(*parts)
        parts = v2.RandomHorizontalFlip(config.flip)(*parts)
    resized = (resize_image(part, (height, width)) for part in parts)
    image, boxes = (v2.functional.crop(part, top, left, *view) for part in resized)
    boxes = v2.functional.clamp_bounding_boxes(boxes).as_subclass(Tensor)
    kept = ((boxes[:, 2:] - boxes[:, :2]) >= LEAST).all(dim=1)
    return image.as_subclass(Tensor), boxes[kept], labels[kept]


def _mark(boxes: Tensor, image: Tensor) -> Tensor:
    from torchvision import tv_tensors

    marked: Tensor = tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=image.shape[-2:])
    return marked


def _fitting(image: Tensor, frame: Size, factor: float) -> Size:
    height, width = image.shape[-2:]
    scale = factor * min(frame[0] / height, frame[1] / width)
    return max(1, round(height * scale)), max(1, round(width * scale))
