"""Batches as one loads them without this project: torchvision's folder and transforms, torch's DataLoader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import InterpolationMode, v2

from mlomae.data.batches import Batch

PADDING = 4
"""What ``data.augment: crop-flip`` reflects of 32 pixels."""

READ_AHEAD = 2
"""Batches that each worker of a DataLoader has under way."""

Transform = Callable[[Any], Tensor]


class TorchvisionStream:
    """Shuffled, augmented batches of an image folder.

    Args:
        transform: of an image; makes a tensor.
        batches: between two restarts, beyond the one that a restart itself reads.
        workers: loader processes.
    """

    def __init__(
        self, folder: Path, transform: Transform, batch_size: int, batches: int, workers: int
    ) -> None:
        images = ImageFolder(folder, transform)
        # As many samples as are wanted, epoch after epoch: no end of an epoch stops the workers.
        sampler = RandomSampler(images, num_samples=(batches + 1) * batch_size)
        self._loader = DataLoader(images, batch_size, sampler=sampler, num_workers=workers)
        self._iterator: Iterator[list[Tensor]] | None = None
        self._number = 0

    def restart(self) -> None:
        """Starts the workers and reads a batch: what a long run does once and then no more."""
        self.close()
        self.next()

    def next(self) -> Batch:
        """The next batch."""
        if self._iterator is None:
            self._iterator = iter(self._loader)
        images, labels = next(self._iterator)
        self._number += 1
        return Batch(images, labels, self._number - 1, 0)

    def close(self) -> None:
        """Ends the workers."""
        self._iterator = None


def crop_flip(side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Transform:
    """What ``data.augment: crop-flip`` does, and the normalisation per channel."""
    return v2.Compose(
        [
            v2.RandomCrop(side, padding=PADDING, padding_mode="reflect"),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(mean, std),
        ]
    )


def mae_recipe(side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> Transform:
    """What ``data.augment: resized-crop`` does, as MAE's recipe writes it."""
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(side, scale=(0.2, 1.0), interpolation=InterpolationMode.BICUBIC),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )


def default_crop(side: int) -> Transform:
    """torchvision's RandomResizedCrop with nothing chosen: from 8 % of the area, bilinear; no flip."""
    return transforms.Compose([transforms.RandomResizedCrop(side), transforms.ToTensor()])
