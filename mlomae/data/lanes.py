"""Shards read front to back: batches whose rows come from lanes.

Each epoch puts the shards in a new order and cuts the row of all their samples into equal *lanes*: every
sample belongs to one lane at most, and what is left over (less than a batch) changes with the order. A global
batch takes the same number of rows from every lane. A rank owns a share of the lanes, a loader process a
share of the rank's, so that nobody reads what another one uses, and neither their number nor a resume changes
a batch: within a lane, blocks of consecutive samples are shuffled by counters, so that batch n is a pure
function of n that costs a reader one block to get to.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from mlomae.data.batches import Order, PixelBatch, outlive_signals
from mlomae.data.faults import BadSample
from mlomae.data.shards.source import ShardSource
from mlomae.data.subset import Loaded, Subset, stride_of
from mlomae.data.transforms import Augment
from mlomae.errors import UserError
from mlomae.random import stream_seed

# Enough to mix many shards in a batch and to feed many processes; each holds a shard open.
MAX_LANES = 32
_NEAR = 4  # samples in memory that are tried in place of a bad one, before others have to be read


def count_lanes(batch: int, world_size: int, num_shards: int) -> int:
    """The lanes of a stream: they divide the batch and can be shared by the ranks.

    The number of ranks enters only where it must, so that runs on 1, 2, 4, … ranks see the same batches.
    """
    limit = max(world_size, min(MAX_LANES, num_shards))
    return max(n for n in range(world_size, limit + 1) if batch % n == 0 and n % world_size == 0)


@dataclass(frozen=True)
class LaneBatches:
    """An endless sequence of batches from the shards of a subset's source.

    Attributes:
        lanes: of the global batch.
        buffer: samples held in memory to be shuffled, over all lanes.
    """

    subset: Subset
    kind: Augment
    order: Order
    lanes: int
    buffer: int

    @property
    def rows(self) -> int:
        """Of one lane in a global batch."""
        return self.order.batch // self.lanes

    @property
    def length(self) -> int:
        """Samples of one lane in an epoch: whole batches only."""
        return len(self.subset) // self.lanes // self.rows * self.rows

    @property
    def blocks(self) -> int:
        """Of a lane in an epoch: samples that are shuffled together, about ``buffer`` of all lanes."""
        return max(1, round(self.length * self.lanes / max(self.buffer, self.order.batch)))

    def iterate(self, first: int, workers: int, pin: bool = False) -> Generator[PixelBatch, None, None]:
        """This rank's parts of the batches from number ``first`` on.

        Raises:
            UserError: a shard cannot be read.
        """
        own = range(self.order.first_row // self.rows, (self.order.first_row + self.order.local) // self.rows)
        workers = min(workers, len(own))
        if not workers:
            return _joined([iter(_Lanes(self, own, first))], pin)
        shares = [own[len(own) * n // workers : len(own) * (n + 1) // workers] for n in range(workers)]
        # One loader for each process: torch would deal batches out to processes, these own rows of each
        # batch.
        loaders = [
            DataLoader(
                _Lanes(self, share, first),
                batch_size=None,
                num_workers=1,
                generator=torch.Generator(),
                worker_init_fn=outlive_signals,
            )
            for share in shares
        ]
        return _joined([iter(loader) for loader in loaders], pin)


class _Lanes(IterableDataset["PixelBatch | UserError"]):
    """Some neighbouring lanes' rows of every batch. A UserError ends it: raised, it would get a traceback."""

    def __init__(self, batches: LaneBatches, lanes: Sequence[int], first: int) -> None:
        self._batches, self._lanes, self._first = batches, lanes, first

    def __iter__(self) -> Iterator[PixelBatch | UserError]:
        batches = self._batches
        order = _EpochOrder(batches.subset, batches.order.seed)
        readers = [_Lane(batches, lane, order) for lane in self._lanes]
        number = self._first
        try:
            while True:
                parts = [reader.read(number) for reader in readers]
                yield _join([PixelBatch.of(part, number, readers[0].first_row) for part in parts])
                number += 1
        except UserError as error:
            yield error


class _Lane:
    """One lane. It remembers the block that it read last and where its shard stands; both can be had anew."""

    def __init__(self, batches: LaneBatches, lane: int, order: _EpochOrder) -> None:
        source = batches.subset.source
        assert isinstance(source, ShardSource)
        self._batches, self._lane, self._order = batches, lane, order
        self._reader = source.open_reader()
        self._block: tuple[int, int] | None = None
        self._rows = torch.empty(0, dtype=torch.int64)  # of this lane in the epoch
        self._begin = 0  # of the block in them
        self._ring: list[int] = []
        self._contents: dict[int, bytes | BadSample] = {}
        self.first_row = lane * batches.rows

    def read(self, number: int) -> Loaded:
        """This lane's rows of batch ``number``."""
        batches = self._batches
        chunks = batches.length // batches.rows
        epoch, chunk = divmod(number, chunks)
        block = ((chunk + 1) * batches.blocks - 1) // chunks
        first = block * chunks // batches.blocks
        if self._block != (epoch, block):
            self._fill(
                epoch, block, first * batches.rows, (block + 1) * chunks // batches.blocks * batches.rows
            )
        offset = self.first_row - batches.order.first_row
        u = batches.order.uniforms(number, torch.device("cpu"))[offset : offset + batches.rows]
        start = (chunk - first) * batches.rows
        candidates = (self._candidates(place) for place in range(start, start + batches.rows))
        return batches.subset.load(candidates, self._content, batches.kind, u)

    def _candidates(self, place: int) -> Iterator[int]:
        """The row at a place of the block, others of the block, and then some from anywhere in the lane."""
        ring = self._ring
        for step in range(min(_NEAR, len(ring))):
            yield ring[(place + step) % len(ring)]
        stride = stride_of(len(self._rows))
        for step in range(1, len(self._rows)):
            yield int(self._rows[(self._begin + place + step * stride) % len(self._rows)])

    def _content(self, row: int) -> bytes:
        content = self._contents.get(row)
        if content is None:  # from outside of the block
            return self._batches.subset.content(row)
        if isinstance(content, BadSample):
            raise content
        return content

    def _fill(self, epoch: int, block: int, begin: int, end: int) -> None:
        batches, subset = self._batches, self._batches.subset
        first = self._lane * batches.length
        self._rows = self._order.rows(epoch)[first : first + batches.length]
        self._begin = begin
        rows = self._rows[begin:end]
        self._block, self._contents = None, {}  # before the new ones come: half the memory
        for row, index in zip(rows.tolist(), subset.indices[rows].tolist(), strict=True):
            try:
                self._contents[row] = self._reader.content(index)
            except BadSample as bad:
                self._contents[row] = bad
        seed = stream_seed(*batches.order.seed, epoch, self._lane, block)
        shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
        self._ring, self._block = rows[shuffled].tolist(), (epoch, block)


class _EpochOrder:
    """The rows of a subset, shard after shard, with the shards in an order drawn for each epoch."""

    def __init__(self, subset: Subset, seed: tuple[int, str, str]) -> None:
        source = subset.source
        assert isinstance(source, ShardSource)
        counts = torch.bincount(source.index.samples.shards[subset.indices]).tolist()
        ends = list(itertools.accumulate(counts))
        self._spans = [(end - count, end) for count, end in zip(counts, ends, strict=True)]
        self._seed = seed
        self._epoch, self._rows = -1, torch.empty(0)

    def rows(self, epoch: int) -> Tensor:
        """int64 [n]."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(stream_seed(*self._seed, epoch))
            shards = torch.randperm(len(self._spans), generator=generator).tolist()
            rows = torch.cat([torch.arange(*self._spans[shard]) for shard in shards])
            # So that even a single shard leaves out others each time.
            self._rows = rows.roll(int(torch.randint(len(rows), (), generator=generator)))
            self._epoch = epoch
        return self._rows


def _join(parts: Sequence[PixelBatch]) -> PixelBatch:
    """One batch of the rows of several, in their order."""
    if len(parts) == 1:
        return parts[0]
    labels = [part.labels for part in parts if part.labels is not None]
    return replace(
        parts[0],
        pixels=torch.cat([part.pixels for part in parts]),
        indices=torch.cat([part.indices for part in parts]),
        labels=torch.cat(labels) if labels else None,
        faults=tuple(fault for part in parts for fault in part.faults),
    )


def _joined(streams: list[Iterator[PixelBatch | UserError]], pin: bool) -> Generator[PixelBatch, None, None]:
    try:
        for parts in zip(*streams, strict=True):
            batch = _join([_raised(part) for part in parts])
            yield batch.pin_memory() if pin else batch
    finally:
        # An error's traceback would keep the loaders, and so their processes, alive.
        streams.clear()


def _raised(part: PixelBatch | UserError) -> PixelBatch:
    if isinstance(part, UserError):
        raise part
    return part
