"""Streams of batches, one per level: batch n is a pure function of n, so a position is one integer."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from mlomae.config import Config
from mlomae.data.sources import Source, open_dataset
from mlomae.data.splits import make_splits
from mlomae.data.transforms import NUM_UNIFORMS, Augment, augment, normalise
from mlomae.errors import UserError
from mlomae.random import counter_uniform, stream_seed

Level = Literal["pretrain", "head", "mask"]
Part = Literal["train", "heldout", "test"]


@dataclass(frozen=True)
class Batch:
    """A rank's share of one global batch."""

    images: Tensor  # float32 [B, C, H, W], normalised
    labels: Tensor | None  # int64 [B]
    number: int  # counter of the batch in its stream
    first_row: int  # position of row 0 in the global batch


@dataclass(frozen=True)
class Subset:
    """Some images of a source, as normalised tensors of one size."""

    source: Source
    indices: Tensor  # int64 [n], into the source
    size: tuple[int, int]  # height, width
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, rows: Tensor, kind: Augment, u: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images float32 [B, C, H, W] and labels int64 [B] of ``rows`` [B]; u is [B, NUM_UNIFORMS]."""
        indices = self.indices[rows]
        stack = self.source.stack
        images = map(self.source.read, indices.tolist()) if stack is None else stack[indices]
        labels = None if self.source.labels is None else self.source.labels[indices]
        return normalise(augment(kind, images, u, self.size), self.mean, self.std), labels


class Stream:
    """An endless stream of a rank's shares of global batches; an epoch's incomplete last batch is dropped.

    Neither the world size nor the number of workers changes what the global batch n holds.

    Raises:
        UserError: the batch exceeds the set or does not divide over the ranks.
    """

    def __init__(
        self, subset: Subset, level: Level, config: Config, kind: Augment, rank: int, world_size: int
    ) -> None:
        batch = getattr(config, level).batch_size
        if batch > len(subset):
            raise UserError(f"{level}.batch_size: {batch} exceeds its set of {len(subset)} images; lower it")
        if batch % world_size:
            raise UserError(
                f"{level}.batch_size: {batch} is not divisible by the {world_size} ranks; use a multiple"
            )
        self._batches = _StreamBatches(
            subset,
            kind,
            order=(config.seed, level, "order"),
            augment_seed=stream_seed(config.seed, level, "augment"),
            batch=batch,
            local=batch // world_size,
            first_row=rank * (batch // world_size),
        )
        self._workers = config.data.workers
        self._next = 0
        self._iterator: Generator[Batch, None, None] | None = None

    def next(self) -> Batch:
        """The next batch of this rank."""
        if self._iterator is None:
            self._iterator = _iterate(self._batches, itertools.count(self._next), self._workers)
        try:
            batch = next(self._iterator)
        except BaseException:
            self.close()  # a retry reads the same batch
            raise
        self._next += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        """The position: number of the next batch. Batches that workers have prefetched do not count."""
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._next = state["next"]
        self.close()

    def close(self) -> None:
        """Ends the loader processes; a later ``next`` starts them again at the same position.

        Worth calling: torch's loader waits 5 s per process when it is collected as part of a reference cycle.
        """
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None


class LevelLoaders:
    """The streams of the three levels and the sets they come from.

    ``pretrain`` and ``head`` read the training set, augmented; ``mask`` reads the held-out set as it is.
    ``head`` and ``mask`` are None where the masking policy does not learn. No stream reads the test set.

    Raises:
        UserError: the data is missing, damaged, overlapping, too small, or lacks needed labels.
    """

    def __init__(self, config: Config, rank: int = 0, world_size: int = 1) -> None:
        data = config.data
        self._config = config
        self._dataset = open_dataset(data, config.model.in_chans)
        self.num_classes = self._dataset.num_classes
        self.mean, self.std = self._dataset.mean, self._dataset.std
        learns = config.masking.learns
        if learns and self._dataset.train.labels is None:
            raise UserError(
                f"data.path: {data.path} has no labels; the head and mask levels need them "
                "(masking.policy=random does not)"
            )
        self._splits = make_splits(self._dataset, data)

        def stream(level: Level, part: Part, kind: Augment) -> Stream:
            return Stream(self._subset(part), level, config, kind, rank, world_size)

        self.pretrain = stream("pretrain", "train", data.augment)
        self.head = stream("head", "train", data.augment) if learns else None
        self.mask = stream("mask", "heldout", "none") if learns else None

    @property
    def sizes(self) -> dict[Part, int]:
        """Images per set; "test" is missing where counting would mean opening the test part."""
        sizes: dict[Part, int] = {"train": len(self._splits.train), "heldout": len(self._splits.heldout)}
        if self._splits.test is not None:
            sizes["test"] = len(self._splits.test)
        elif self._dataset.files is not None and not self._dataset.files[1].shards:
            sizes["test"] = len(self._dataset.files[1].names)
        return sizes

    def evaluation(self, part: Part) -> Iterator[Batch]:
        """All images of a set once, in order, not augmented; the last batch may be short.

        Every rank gets all of them: ``number`` counts the batches, ``first_row`` is 0.
        """
        subset = self._subset(part)
        batches = _OrderedBatches(subset, self._config.eval.batch_size)
        return _iterate(batches, range(len(batches)), self._config.data.workers)

    def sample_images(self, part: Part, count: int) -> Tensor:
        """The first ``count`` images of a set (all if it has fewer): float32 [count, C, H, W], normalised."""
        subset = self._subset(part)
        return _OrderedBatches(subset, min(count, len(subset))).read(0).images

    def close(self) -> None:
        """Ends the loader processes of all streams."""
        for stream in (self.pretrain, self.head, self.mask):
            if stream is not None:
                stream.close()

    def _subset(self, part: Part) -> Subset:
        if part == "test":
            return self._test
        return self._make_subset(self._dataset.train, getattr(self._splits, part))

    @cached_property
    def _test(self) -> Subset:
        if self._dataset.open_test is None:
            assert self._splits.test is not None, "split off where there is no test part"
            return self._make_subset(self._dataset.train, self._splits.test)
        source = self._dataset.open_test()
        return self._make_subset(source, torch.arange(len(source)))

    def _make_subset(self, source: Source, indices: Tensor) -> Subset:
        return Subset(source, indices, self._config.model.size, self.mean, self.std)


class _Batches(TorchDataset[Batch | UserError], ABC):
    """Whole batches by number. A UserError is returned: raised, a worker would wrap it in a traceback."""

    @abstractmethod
    def read(self, number: int) -> Batch:
        """This rank's part of batch ``number``."""

    def __getitem__(self, number: int) -> Batch | UserError:
        try:
            return self.read(number)
        except UserError as error:
            return error


@dataclass(frozen=True)
class _StreamBatches(_Batches):
    subset: Subset
    kind: Augment
    order: tuple[int, str, str]
    augment_seed: int
    batch: int
    local: int
    first_row: int

    def read(self, number: int) -> Batch:
        epoch, position = divmod(number, len(self.subset) // self.batch)
        start = position * self.batch + self.first_row
        rows = _permutation(len(self.subset), stream_seed(*self.order, epoch))[start : start + self.local]
        u = counter_uniform(self.augment_seed, number, self.first_row, (self.local, NUM_UNIFORMS))
        return Batch(*self.subset.read(rows, self.kind, u), number, self.first_row)


@dataclass(frozen=True)
class _OrderedBatches(_Batches):
    subset: Subset
    batch: int

    def __len__(self) -> int:
        return -(-len(self.subset) // self.batch)

    def read(self, number: int) -> Batch:
        rows = torch.arange(len(self.subset))[number * self.batch : (number + 1) * self.batch]
        return Batch(*self.subset.read(rows, "none", torch.zeros(len(rows), NUM_UNIFORMS)), number, 0)


@lru_cache(maxsize=4)
def _permutation(length: int, seed: int) -> Tensor:
    """int64 [length]; cached because all batches of an epoch share it."""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed))


def _iterate(batches: _Batches, numbers: Iterable[int], workers: int) -> Generator[Batch, None, None]:
    # The generator keeps the loader from drawing its (unused) worker seed from the global state.
    loader = DataLoader(
        batches, batch_size=None, sampler=numbers, num_workers=workers, generator=torch.Generator()
    )
    for batch in loader:
        if isinstance(batch, UserError):
            raise batch
        yield batch
