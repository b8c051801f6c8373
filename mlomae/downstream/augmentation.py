"""How images are varied to train a classifier, one by one; batch n is a pure function of n."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from pydantic import Field, field_validator
from timm.data.auto_augment import RandAugment, rand_augment_transform
from timm.data.transforms import RandomResizedCropAndInterpolation
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import functional

from mlomae.data.batches import Batches, Order, PixelBatch, permutation
from mlomae.data.decoding import decode_image
from mlomae.data.faults import Fault
from mlomae.data.subset import Subset, first_good, substitutes
from mlomae.data.transforms import fit
from mlomae.random import stream_seed
from mlomae.sections import NonNegative, Section, Share

CPU = torch.device("cpu")
# Pixels by which RandAugment moves an image at most, as a share of its shorter side (timm's).
MAX_TRANSLATION = 0.45
_RAND_AUGMENT = re.compile(r"rand(-(m\d+|n[1-9]\d*|p[01](\.\d+)?|mstd\d+(\.\d+)?|mmax\d+|inc[01]))*")


class AugmentConfig(Section):
    """How training images are varied (defaults: MAE's on ImageNet), and how test images are cut."""

    crop: Literal["resized", "padded", "none"] = Field(
        "resized",
        description="resized: a random box, brought to size (photographs); padded: reflected by 1/8 of each "
        "side, then cropped (32x32 images); none: shorter side brought to size, centre crop",
    )
    min_area: float = Field(0.08, gt=0, le=1, description="smallest random box, as a share of the image")
    flip: bool = Field(
        True, description="mirror every other image; not where direction matters, as in digits"
    )
    rand_augment: str = Field("rand-m9-mstd0.5-inc1", description="none, or RandAugment in timm's notation")
    color_jitter: Share = Field(0.0, description="largest change of brightness, contrast and saturation")
    erasing: Share = Field(0.25, description="share of the images in which a box is filled with noise")
    mixup: NonNegative = Field(
        0.8, description="alpha of mixing two images; 0: none. With cutmix, each takes half of the batches"
    )
    cutmix: NonNegative = Field(1.0, description="alpha of pasting a box of another image; 0: none")
    label_smoothing: float = Field(0.1, ge=0, lt=1, description="of a label, spread evenly over all classes")
    test_crop: float = Field(
        1.0, gt=0, le=1, description="share of a test image's shorter side in its centre crop; 0.875 at 224"
    )

    @field_validator("rand_augment")
    @classmethod
    def _check_rand_augment(cls, value: str) -> str:
        if value != "none" and not _RAND_AUGMENT.fullmatch(value):
            raise ValueError(f"{value!r} is neither none nor timm's notation, such as rand-m9-mstd0.5-inc1")
        return value

    @property
    def mixes(self) -> bool:
        """Whether two images become one, in pairs within a batch."""
        return bool(self.mixup or self.cutmix)


class Augmentation:
    """Varies single images, before they are normalised; grey ones too.

    Args:
        size: (h, w) of what comes out.
        mean: per channel, of values in [0, 1]: fills what a rotation uncovers.
    """

    def __init__(self, config: AugmentConfig, size: tuple[int, int], mean: tuple[float, ...]) -> None:
        self.size, self.fits = size, config.crop != "resized"
        steps: list[Callable[[Any], Any]] = []
        colours: list[Callable[[Any], Any]] = []
        if config.crop == "resized":
            scale = (config.min_area, 1.0)
            crop = RandomResizedCropAndInterpolation(size, scale, interpolation="bicubic")
            steps += [functional.to_pil_image, crop]
        elif config.crop == "padded":
            steps.append(transforms.RandomCrop(size, (size[1] // 8, size[0] // 8), padding_mode="reflect"))
        if config.flip:
            steps.append(transforms.RandomHorizontalFlip())
        if config.rand_augment != "none":
            colours.append(_rand_augment(config.rand_augment, min(size), mean))
        if config.color_jitter:
            colours.append(transforms.ColorJitter(*(config.color_jitter,) * 3))
        # Pillow's images only where they are needed: the other steps are faster on tensors.
        if colours and self.fits:
            steps.append(functional.to_pil_image)
        steps += colours
        if colours or not self.fits:
            steps.append(functional.pil_to_tensor)
        self._steps = steps

    def __call__(self, image: Tensor, seed: int) -> Tensor:
        """uint8 [C, H, W], C = 1 or 3 → [C, h, w]; a function of its arguments only.

        Seeds the generators that its steps draw from: see ``generators_kept``.
        """
        if self.fits:
            image = fit(image, self.size)
        if not self._steps:
            return image
        random.seed(seed)
        np.random.seed(seed)
        # Not torch.manual_seed, which would reach for the GPU too, in every loader process.
        torch.default_generator.manual_seed(seed)
        for step in self._steps:
            image = step(image)
        return image


def _rand_augment(notation: str, side: int, mean: tuple[float, ...]) -> RandAugment:
    fill = tuple(min(255, round(255 * value)) for value in mean)
    chosen = rand_augment_transform(
        notation,
        {
            "translate_const": int(side * MAX_TRANSLATION),
            "img_mean": fill,
            "interpolation": Image.Resampling.BICUBIC,
        },
    )
    for operation in chosen.ops:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return chosen


def _posterize(image: Image.Image, bits: int, **_: Any) -> Image.Image:
    """As timm's, which at its highest magnitude asks for 0 bits: black, which newer Pillow refuses."""
    if bits >= 8:
        return image
    return ImageOps.posterize(image, bits) if bits else Image.new(image.mode, image.size)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leaves the generators as they were that libraries draw from."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


@dataclass(frozen=True)
class AugmentedBatches(Batches):
    """Augmented images in a new order each epoch; an epoch's incomplete last batch is dropped.

    In place of a bad sample stands a good one, which depends on its row only.

    Attributes:
        subset: of a source that can be read in any order.
    """

    subset: Subset
    augmentation: Augmentation
    order: Order

    def read(self, number: int) -> PixelBatch:
        order, source = self.order, self.subset.source
        epoch, position = divmod(number, len(self.subset) // order.batch)
        start = position * order.batch + order.first_row
        rows = permutation(len(self.subset), stream_seed(*order.seed, epoch), CPU)[
            start : start + order.local
        ]
        faults: list[Fault] = []
        images, used = [], []
        with generators_kept():
            for place, row in enumerate(rows.tolist(), order.first_row):
                image, index = self._decode(row, faults)
                images.append(self.augmentation(image, stream_seed(order.augment_seed, number, place)))
                used.append(index)
        indices = torch.tensor(used)
        assert source.labels is not None
        return PixelBatch(
            torch.stack(images), indices, source.labels[indices], number, order.first_row, tuple(faults)
        )

    def _decode(self, row: int, faults: list[Fault]) -> tuple[Tensor, int]:
        """The image of a row, or of the first good one after it, and its index; the bad go to ``faults``."""
        source, total = self.subset.source, len(self.subset)
        if source.stack is not None:
            index = int(self.subset.indices[row])
            return source.stack[index], index
        indices, channels = self.subset.indices, len(self.subset.mean)
        least = self.subset.size if self.augmentation.fits else None
        index, image = first_good(
            (int(indices[other]) for other in substitutes(row, total)),
            source.keys,
            lambda index: decode_image(source.content(index), channels, least),
            faults,
        )
        return image, index
