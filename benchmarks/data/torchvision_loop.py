"""Batches as one loads them without this project: torchvision's folder and transforms, torch's DataLoader."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from mlomae.data import Batch

PADDING = 4
"""What ``data.augment: crop-flip`` reflects of 32 pixels."""


class TorchvisionStream:
    """Shuffled, augmented batches of an image folder; ``restart`` comes before the first one.

    Args:
        batches: between two restarts, beyond the one that a restart itself reads.
        mean, std: of the normalisation, per channel.
        workers: loader processes.
    """

    def __init__(
        self,
        folder: Path,
        batch_size: int,
        batches: int,
        side: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        workers: int,
    ) -> None:
        transform = v2.Compose(
            [
                v2.RandomCrop(side, padding=PADDING, padding_mode="reflect"),
                v2.RandomHorizontalFlip(),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(mean, std),
            ]
        )
        images = ImageFolder(folder, transform)
        # As many samples as are wanted, epoch after epoch: no end of an epoch stops the workers.
        sampler = RandomSampler(images, num_samples=(batches + 1) * batch_size)
        self._loader = DataLoader(images, batch_size, sampler=sampler, num_workers=workers)
        self._iterator: Iterator[list[Tensor]] = iter(())
        self._number = 0

    def restart(self) -> None:
        """Starts the workers and reads a batch: what a long run does once and then no more."""
        self._iterator = iter(())  # ends the workers of before
        self._iterator = iter(self._loader)
        next(self._iterator)

    def next(self) -> Batch:
        """The next batch."""
        images, labels = next(self._iterator)
        self._number += 1
        return Batch(images, labels, self._number - 1, 0)
