"""The endless stream of one level's batches, on the level's device."""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterator

import torch

from mlomae.data.batches import Batch, PixelBatch, ShuffledBatches, Subset, iterate
from mlomae.data.transforms import Augment
from mlomae.errors import UserError
from mlomae.random import stream_seed


class Stream:
    """An endless stream of a rank's shares of global batches; an epoch's incomplete last batch is dropped.

    Neither the world size nor the number of workers changes what the global batch n holds, nor does it
    matter where the images lie.

    Args:
        subset: its images; those of a resident one are augmented on its device, in this process.
        level: for messages, and seed of the order.
        batch: images of a global batch.
        seed: of the run.
        kind: augmentation.
        workers: loader processes.
        rank, world_size: this process among those that share a batch.
        device: of the batches.

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
    ) -> None:
        if batch > len(subset):
            raise UserError(f"{level}.batch_size: {batch} exceeds its set of {len(subset)} images; lower it")
        if batch % world_size:
            raise UserError(
                f"{level}.batch_size: {batch} is not divisible by the {world_size} ranks; use a multiple"
            )
        self._batches = ShuffledBatches(
            subset,
            kind,
            order=(seed, level, "order"),
            augment_seed=stream_seed(seed, level, "augment"),
            batch=batch,
            local=batch // world_size,
            first_row=rank * (batch // world_size),
        )
        self._workers = workers
        self._device = device
        self._next = 0
        self._iterator: Generator[PixelBatch, None, None] | None = None

    def next(self) -> Batch:
        """The next batch of this rank."""
        if self._iterator is None:
            self._iterator = self._open()
        try:
            batch = next(self._iterator)
        except BaseException:
            self.close()  # a retry reads the same batch
            raise
        self._next += 1
        return batch.normalised(self._batches.subset)

    def state_dict(self) -> dict[str, int]:
        """The position: number of the next batch. Batches that were read ahead do not count."""
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

    def _open(self) -> Generator[PixelBatch, None, None]:
        numbers = itertools.count(self._next)
        if self._batches.subset.resident:
            return (self._batches.read(number) for number in numbers)
        on_gpu = self._device.type == "cuda"
        batches = iterate(self._batches, numbers, self._workers, pin=on_gpu)
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
        for tensor in (ahead.pixels, ahead.labels):
            if tensor is not None:
                tensor.record_stream(current)
        ready, ahead = ahead, upload()
        yield ready
