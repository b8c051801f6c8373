"""How evaluations that train read images: by number, shared by the ranks, bad samples taken down."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from mlomae.bad_samples import BadSamples
from mlomae.data.batches import Batches, Order, PixelBatch, iterate
from mlomae.data.faults import HopelessError
from mlomae.data.ledger import FaultLedger
from mlomae.data.stream import upload_ahead
from mlomae.data.subset import digest_of_keys
from mlomae.distributed.env import World
from mlomae.downstream.sections import TrainedTaskConfig
from mlomae.errors import UserError
from mlomae.random import stream_seed
from mlomae.ranges import position
from mlomae.run_dir import RunDir


class Reader:
    """Batches of one task on the device, and its account of bad samples.

    Args:
        workers: loader processes.
        max_bad_share: of the samples that ``ledger`` is told to expect.

    Attributes:
        ledger: of the bad samples.
    """

    def __init__(
        self, config: TrainedTaskConfig, workers: int, max_bad_share: float, run_dir: RunDir, world: World
    ) -> None:
        self._workers, self._every, self._world = workers, config.log_every, world
        self.ledger = FaultLedger(max_bad_share)
        self._bad = BadSamples(self.ledger, run_dir.bad_samples)
        self._bad.restore()
        self._reading: Generator[PixelBatch, None, None] | None = None

    def training(self, batches: Batches, first: int, steps_per_epoch: int) -> Iterator[Any]:
        """This rank's share of batch ``first`` and all that follow, without end.

        Raises:
            UserError: too many samples are bad. With several ranks they find that out together, when a line
                is logged.
        """
        for batch in self._read(batches, itertools.count(first)):
            self.ledger.note(batch.faults)
            done = batch.number + 1
            due = done % self._every == 0 or done % steps_per_epoch == 0
            if due or (self._world.size == 1 and batch.faults):
                self._bad.exchange()
            yield batch

    def testing(self, batches: Batches, count: int) -> Iterator[Any]:
        """This rank's part of ``count`` batches; those of bad samples only are empty."""
        for batch in self._read(batches, range(self._world.rank, count, self._world.size)):
            position.number += 1
            self.ledger.note(batch.faults)
            yield batch

    def finish(self) -> int:
        """Takes down what all ranks have met; how many samples are bad, on rank 0. Called on all ranks."""
        self._bad.exchange()
        return len(self.ledger)

    def close(self) -> None:
        """Ends loader processes, and names the bad samples that rank 0 has met."""
        if self._reading is not None:
            self._reading.close()
        self._bad.write_own()

    def _read(self, batches: Batches, numbers: Iterable[int]) -> Iterator[PixelBatch]:
        on_gpu = self._world.device.type == "cuda"
        self._reading = reading = iterate(batches, numbers, self._workers, pin=on_gpu)
        try:
            yield from upload_ahead(reading, self._world.device) if on_gpu else reading
        except HopelessError as error:
            self.ledger.note(error.faults)
            if self._world.size == 1:
                self.ledger.check()  # which often has a better reason to stop
            raise


def digest_of(names: Iterable[str], num_classes: int) -> str:
    """Of the names of the training images and the number of classes: 16 hex digits."""
    return digest_of_keys([str(num_classes), *names])


def order_of(config: TrainedTaskConfig, task: str, num_images: int, world: World) -> Order:
    """The order of a task's training batches, and this rank's share of each.

    Args:
        task: for seeds that differ from those of other tasks.

    Raises:
        UserError: the batch exceeds the set or does not divide over the ranks.
    """
    batch = config.optim.batch_size
    if batch > num_images:
        raise UserError(f"optim.batch_size: {batch} exceeds the {num_images} training images; lower it")
    if batch % world.size:
        raise UserError(
            f"optim.batch_size: {batch} is not divisible by the {world.size} ranks; use a multiple"
        )
    local = batch // world.size
    return Order(
        seed=(config.seed, task, "order"),
        augment_seed=stream_seed(config.seed, task, "augment"),
        batch=batch,
        local=local,
        first_row=world.rank * local,
    )
