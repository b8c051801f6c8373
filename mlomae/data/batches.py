"""Batches by number: batch n is a pure function of n, so a position in a stream is one integer."""

from __future__ import annotations

import signal
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from mlomae.data.faults import Fault
from mlomae.data.subset import Loaded, Subset
from mlomae.data.transforms import NUM_UNIFORMS, Augment, normalise
from mlomae.errors import UserError
from mlomae.random import counter_uniforms, stream_seed


@dataclass(frozen=True)
class Batch:
    """A rank's share of one global batch."""

    images: Tensor  # float32 [B, C, H, W], normalised
    labels: Tensor | None  # int64 [B], or label maps uint8 [B, H, W]
    number: int  # counter of the batch in its stream
    first_row: int  # position of row 0 in the global batch


@dataclass(frozen=True)
class PixelBatch:
    """A batch as it travels: a byte per number, a quarter of what it becomes on the device."""

    pixels: Tensor  # uint8 [B, C, H, W], augmented
    indices: Tensor  # int64 [B], into the source
    labels: Tensor | None
    number: int
    first_row: int
    faults: tuple[Fault, ...]  # met on the way

    @classmethod
    def of(cls, loaded: Loaded, number: int, first_row: int) -> PixelBatch:
        """Loaded rows as batch ``number``."""
        return cls(loaded.images, loaded.indices, loaded.labels, number, first_row, loaded.faults)

    def __reduce__(self) -> tuple[Any, ...]:
        # From a loader process only pixels and label maps are worth a file of shared memory of their own.
        labels = self.labels if self.labels is None or self.labels.ndim > 1 else self.labels.numpy()
        small = self.number, self.first_row, self.faults
        return _unpack, (self.pixels, self.indices.numpy(), labels, *small)

    @property
    def tensors(self) -> list[Tensor]:
        """Those that ``to`` moves."""
        return [self.pixels] if self.labels is None else [self.pixels, self.labels]

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


def _unpack(
    pixels: Tensor, indices: np.ndarray, labels: np.ndarray | Tensor | None, *rest: Any
) -> PixelBatch:
    known = torch.from_numpy(labels) if isinstance(labels, np.ndarray) else labels
    return PixelBatch(pixels, torch.from_numpy(indices), known, *rest)


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
class Order:
    """Which rows the batches of an endless stream take, and what augments them.

    Attributes:
        seed: seed and names from which the order of each epoch is drawn.
        augment_seed: of the numbers behind the augmentation.
        batch, local: images of a global batch, and of this rank's share.
        first_row: where the share begins.
    """

    seed: tuple[int, str, str]
    augment_seed: int
    batch: int
    local: int
    first_row: int

    def uniforms(self, number: int, device: torch.device) -> Tensor:
        """float32 [local, NUM_UNIFORMS] for this rank's rows of batch ``number``."""
        ahead = _uniforms(self.augment_seed, number // _AHEAD, self.first_row, self.local, device)
        return ahead[number % _AHEAD]


@dataclass(frozen=True)
class ShuffledBatches(Batches):
    """An endless sequence, in a new order each epoch; an epoch's incomplete last batch is dropped."""

    subset: Subset
    kind: Augment
    order: Order

    def read(self, number: int) -> PixelBatch:
        order, device = self.order, self.subset.indices.device
        epoch, position = divmod(number, len(self.subset) // order.batch)
        start = position * order.batch + order.first_row
        rows = permutation(len(self.subset), stream_seed(*order.seed, epoch), device)
        chosen = rows[start : start + order.local]
        loaded = self.subset.read(chosen, self.kind, order.uniforms(number, device))
        return PixelBatch.of(loaded, number, order.first_row)


@dataclass(frozen=True)
class OrderedBatches(Batches):
    """All images once, in order, not augmented; bad samples are left out, the last batch may be short."""

    subset: Subset
    batch: int

    def __len__(self) -> int:
        return -(-len(self.subset) // self.batch)

    def read(self, number: int) -> PixelBatch:
        rows = torch.arange(number * self.batch, min((number + 1) * self.batch, len(self.subset)))
        return PixelBatch.of(self.subset.read_good(rows), number, 0)


# Batches whose random numbers are drawn together: for one they take longer than its crops.
_AHEAD = 32


@lru_cache(maxsize=4)
def _uniforms(seed: int, chunk: int, first_row: int, rows: int, device: torch.device) -> Tensor:
    """float32 [_AHEAD, rows, NUM_UNIFORMS] for the batches of a chunk."""
    return counter_uniforms(seed, chunk * _AHEAD, _AHEAD, first_row, (rows, NUM_UNIFORMS), device)


@lru_cache(maxsize=4)
def permutation(length: int, seed: int, device: torch.device) -> Tensor:
    """int64 [length]; cached because all batches of an epoch share it."""
    order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
    return order if device.type == "cpu" else order.pin_memory().to(device, non_blocking=True)


def outlive_signals(worker: int) -> None:
    """In a loader process: to stop a whole job is up to the training, which ends its loaders itself."""

    def once(number: int, frame: object) -> None:
        # A loader that hangs is ended by another SIGTERM, of torch's.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    # A terminal's Ctrl-C reaches all processes of a run, which goes on until its step is done.
    for number in (signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, once)


def iterate(
    batches: Batches, numbers: Iterable[int], workers: int, pin: bool = False
) -> Generator[PixelBatch, None, None]:
    """Batches by number, read in ``workers`` processes, or in this one where there are none.

    Args:
        pin: hand them over in memory that a GPU reads itself.

    Raises:
        UserError: a set cannot be read.
    """
    # The generator keeps the loader from drawing its (unused) worker seed from the global state.
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator(),
        worker_init_fn=outlive_signals,
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch
