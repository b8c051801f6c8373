"""The endless stream of one level's batches, on the level's device."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Mapping
from typing import Any

import torch

from mlomae.data.batches import Batch, Order, PixelBatch, ShuffledBatches, iterate
from mlomae.data.faults import Fault, HopelessError
from mlomae.data.lanes import LaneBatches, count_lanes
from mlomae.data.ledger import FaultLedger
from mlomae.data.shards.source import ShardSource
from mlomae.data.subset import Subset
from mlomae.data.transforms import Augment
from mlomae.errors import UserError
from mlomae.random import stream_seed


class Stream:
    """An endless stream of a rank's shares of global batches; an epoch's incomplete last batch is dropped.

    Neither the number of workers nor, where the set is read in random order, the world size changes what the
    global batch n holds (``mlomae.data.lanes`` tells what a sequential set needs for that). Nor does it
    matter whether images that are read in random order are resident. Where a sample is bad, a good one takes
    its place, which the epoch then holds twice.

    Args:
        subset: its images; those of a resident one are augmented on its device, in this process.
        level: for messages, and seed of the order.
        batch: images of a global batch.
        seed: of the run.
        kind: augmentation.
        workers: loader processes.
        rank: of this process among those that share a batch.
        world_size: their number.
        device: of the batches.
        ledger: receives the bad samples.
        buffer: samples in memory to be shuffled, where shards are read front to back; None reads in random
            order.

    Raises:
        UserError: the batch exceeds the set or does not divide over the ranks.
    """

    def __init__(
        self,
        subset: Subset,
        level: str,
        batch: int,
        seed: int,
        kind: Augment,
        workers: int,
        rank: int,
        world_size: int,
        device: torch.device,
        ledger: FaultLedger,
        buffer: int | None = None,
    ) -> None:
        if batch > len(subset):
            raise UserError(f"{level}.batch_size: {batch} exceeds its set of {len(subset)} images; lower it")
        if batch % world_size:
            raise UserError(
                f"{level}.batch_size: {batch} is not divisible by the {world_size} ranks; use a multiple"
            )
        self._subset, self._kind = subset, kind
        self._level = level
        local = batch // world_size
        self._order = Order(
            seed=(seed, level, "order"),
            augment_seed=stream_seed(seed, level, "augment"),
            batch=batch,
            local=local,
            first_row=rank * local,
        )
        self._workers, self._world_size, self._device = workers, world_size, device
        self._ledger = ledger
        self._buffer = buffer
        self._lanes: int | None = None
        if buffer is not None:
            assert isinstance(subset.source, ShardSource), "only shards are read front to back"
            self._lanes = count_lanes(batch, world_size, len(subset.source.index.shards))
        self._next = 0
        self._iterator: Generator[PixelBatch, None, None] | None = None

    def next(self) -> Batch:
        """The next batch of this rank.

        Raises:
            UserError: the set cannot be read, or too many of its samples are bad.
        """
        if self._iterator is None:
            self._iterator = self._open()
        try:
            batch = next(self._iterator)
            self._take_down(batch.faults)
        except HopelessError as error:
            self.close()
            self._take_down(error.faults)  # which often has a better reason to stop
            raise
        except BaseException:
            self.close()  # a retry reads the same batch
            raise
        self._next += 1
        return batch.normalised(self._subset)

    def _take_down(self, faults: Iterable[Fault]) -> None:
        if self._world_size == 1:
            self._ledger.add(faults)
        else:
            self._ledger.note(faults)  # all ranks stop together, when they have exchanged what they know

    @property
    def access(self) -> str:
        """How the images are read, in words."""
        return "random access" if self._lanes is None else f"shards read in {self._lanes} lanes"

    def state_dict(self) -> dict[str, Any]:
        """The position: number of the next batch, and of which images. What was read ahead does not count."""
        lanes = {} if self._lanes is None else {"lanes": self._lanes}
        return {"next": self._next, "images": self._subset.digest, **lanes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues there.

        Raises:
            UserError: the images or the order were others, or the ranks cannot share that stream's lanes.
        """
        if state.get("images", self._subset.digest) != self._subset.digest:
            raise UserError(
                f"data.path: the {self._level} level has read other images so far than are found now (their "
                "names or their number differ); give the same ones, or begin another run_dir"
            )
        lanes = state.get("lanes")
        if (self._lanes is None) != (lanes is None):
            before, now = ("random", "sequential") if lanes is None else ("sequential", "random")
            raise UserError(
                f"data.access: the {self._level} level has read in {before} order so far, this run would in "
                f"{now} order; set data.access and data.resident as they were"
            )
        if self._lanes is not None and lanes is not None:
            if lanes % self._world_size:
                raise UserError(
                    f"{self._level}: its shards were read in {lanes} lanes, which {self._world_size} ranks "
                    f"cannot share; resume with a number of ranks that divides {lanes}"
                )
            self._lanes = lanes
        self._next = state["next"]
        self.close()

    def close(self) -> None:
        """Ends the loader processes; a later ``next`` starts them again at the same position.

        Worth calling: torch's loader waits 5 s per process when it is collected as part of a reference cycle.
        """
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _open(self) -> Generator[PixelBatch, None, None]:
        on_gpu = self._device.type == "cuda"
        if self._lanes is not None and self._buffer is not None:
            lanes = LaneBatches(self._subset, self._kind, self._order, self._lanes, self._buffer)
            batches = lanes.iterate(self._next, self._workers, pin=on_gpu)
        else:
            numbers = itertools.count(self._next)
            shuffled = ShuffledBatches(self._subset, self._kind, self._order)
            if self._subset.resident:
                return (shuffled.read(number) for number in numbers)
            batches = iterate(shuffled, numbers, self._workers, pin=on_gpu)
        return upload_ahead(batches, self._device) if on_gpu else batches


def upload_ahead(batches: Iterator[PixelBatch], device: torch.device) -> Generator[PixelBatch, None, None]:
    """Batches on a GPU, each copied on a side stream while the one before is in use.

    Args:
        batches: in pinned memory.
    """
    side = torch.cuda.Stream(device)

    def upload() -> PixelBatch | Exception | None:
        try:
            batch = next(batches, None)
        except Exception as error:  # belongs to the batch after the one that is handed out now
            return error
        if batch is None:
            return None
        with torch.cuda.stream(side):
            return batch.to(device)

    ahead = upload()
    while ahead is not None:
        if isinstance(ahead, Exception):
            raise ahead
        current = torch.cuda.current_stream(device)
        # Before the next copy is queued, which nobody has to wait for yet.
        current.wait_stream(side)
        for tensor in ahead.tensors:
            tensor.record_stream(current)
        ready, ahead = ahead, upload()
        yield ready
