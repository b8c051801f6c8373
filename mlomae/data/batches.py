"""Batches by number: batch n is a pure function of n, so a position in a stream is one integer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from mlomae.data.sources import Source
from mlomae.data.transforms import NUM_UNIFORMS, Augment, augment, normalise
from mlomae.errors import UserError
from mlomae.random import counter_uniforms, stream_seed


@dataclass(frozen=True)
class Batch:
    """A rank's share of one global batch."""

    images: Tensor  # float32 [B, C, H, W], normalised
    labels: Tensor | None  # int64 [B]
    number: int  # counter of the batch in its stream
    first_row: int  # position of row 0 in the global batch


@dataclass(frozen=True)
class PixelBatch:
    """A batch as it travels: a byte per number, a quarter of what it becomes on the device."""

    pixels: Tensor  # uint8 [B, C, H, W], augmented
    labels: Tensor | None
    number: int
    first_row: int

    def to(self, device: torch.device) -> PixelBatch:
        """On the device; from pinned memory without waiting."""
        labels = None if self.labels is None else self.labels.to(device, non_blocking=True)
        return replace(self, pixels=self.pixels.to(device, non_blocking=True), labels=labels)

    def pin_memory(self) -> PixelBatch:
        """In memory that a GPU reads itself; the name is what torch's loader looks for."""
        labels = None if self.labels is None else self.labels.pin_memory()
        return replace(self, pixels=self.pixels.pin_memory(), labels=labels)

    def normalised(self, subset: Subset) -> Batch:
        """Numbers instead of bytes, on the same device."""
        images = normalise(self.pixels, subset.mean, subset.std)
        return Batch(images, self.labels, self.number, self.first_row)


@dataclass(frozen=True)
class Subset:
    """Some images of a source, at one size.

    Attributes:
        source: of the images.
        indices: int64 [n], into the source, on the device on which images are augmented.
        size: height, width.
        mean, std: per channel, of values in [0, 1].
        resident: whether the images lie decoded on that device (``mlomae.data.resident``).
    """

    source: Source
    indices: Tensor
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resident: bool = False

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, rows: Tensor, kind: Augment, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images uint8 [B, C, H, W] and labels int64 [B] of ``rows`` [B]; u is [B, NUM_UNIFORMS]."""
        indices = self.indices[rows]
        stack = self.source.stack
        images = map(self.source.read, indices.tolist()) if stack is None else stack.index_select(0, indices)
        labels = None if self.source.labels is None else self.source.labels[indices]
        return augment(kind, images, u, self.size), labels


class Batches(TorchDataset["PixelBatch | UserError"], ABC):
    """Whole batches by number. A UserError is returned: raised, a worker would wrap it in a traceback."""

    @abstractmethod
    def read(self, number: int) -> PixelBatch:
        """This rank's part of batch ``number``."""

    def __getitem__(self, number: int) -> PixelBatch | UserError:
        try:
            return self.read(number)
        except UserError as error:
            return error


@dataclass(frozen=True)
class ShuffledBatches(Batches):
    """An endless sequence, in a new order each epoch; an epoch's incomplete last batch is dropped.

    Attributes:
        order: seed and names from which the order of each epoch is drawn.
        augment_seed: of the numbers behind the augmentation.
        batch, local: images of a global batch, and of this rank's share.
        first_row: where the share begins.
    """

    subset: Subset
    kind: Augment
    order: tuple[int, str, str]
    augment_seed: int
    batch: int
    local: int
    first_row: int

    def read(self, number: int) -> PixelBatch:
        device = self.subset.indices.device
        epoch, position = divmod(number, len(self.subset) // self.batch)
        start = position * self.batch + self.first_row
        order = _permutation(len(self.subset), stream_seed(*self.order, epoch), device)
        u = _uniforms(self.augment_seed, number // _AHEAD, self.first_row, self.local, device)[
            number % _AHEAD
        ]
        images, labels = self.subset.read(order[start : start + self.local], self.kind, u)
        return PixelBatch(images, labels, number, self.first_row)


@dataclass(frozen=True)
class OrderedBatches(Batches):
    """All images once, in order, not augmented; the last batch may be short."""

    subset: Subset
    batch: int

    def __len__(self) -> int:
        return -(-len(self.subset) // self.batch)

    def read(self, number: int) -> PixelBatch:
        rows = torch.arange(len(self.subset))[number * self.batch : (number + 1) * self.batch]
        return PixelBatch(*self.subset.read(rows, "none", torch.zeros(len(rows), NUM_UNIFORMS)), number, 0)


# Batches whose random numbers are drawn together: for one they take longer than its crops.
_AHEAD = 32


@lru_cache(maxsize=4)
def _uniforms(seed: int, chunk: int, first_row: int, rows: int, device: torch.device) -> Tensor:
    """float32 [_AHEAD, rows, NUM_UNIFORMS] for the batches of a chunk."""
    return counter_uniforms(seed, chunk * _AHEAD, _AHEAD, first_row, (rows, NUM_UNIFORMS), device)


@lru_cache(maxsize=4)
def _permutation(length: int, seed: int, device: torch.device) -> Tensor:
    """int64 [length]; cached because all batches of an epoch share it."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    return order if device.type == "cpu" else order.pin_memory().to(device, non_blocking=True)


def iterate(
    batches: Batches, numbers: Iterable[int], workers: int, pin: bool = False
) -> Generator[PixelBatch, None, None]:
    """Batches by number, read in ``workers`` processes, or in this one where there are none.

    Args:
        pin: hand them over in memory that a GPU reads itself.

    Raises:
        UserError: a sample cannot be read.
    """
    # The generator keeps the loader from drawing its (unused) worker seed from the global state.
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch
