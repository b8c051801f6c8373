"""Writes shards in several processes, a shard at a time each."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mlomae.data.faults import BadSample, Fault
from mlomae.errors import UserError
from mlomae.sharding.encoding import Encoding, encode
from mlomae.sharding.inputs import Images
from mlomae.sharding.shard_file import Record, Row, add_sample, open_shard, write_record

INTERVAL = 0.2  # seconds between two looks at the workers, and of a worker at its parent


@dataclass(frozen=True)
class PlannedPart:
    """A part, and which samples go where.

    Attributes:
        name: train, test or val.
        order: sample numbers in the order in which they are written.
        samples_per_shard: bad ones included.
        first: what the keys of samples are counted from, so that they are unique in the set.
    """

    name: str
    images: Images
    order: Sequence[int]
    samples_per_shard: int
    first: int

    @cached_property
    def shard_names(self) -> tuple[str, ...]:
        count = -(-len(self.order) // self.samples_per_shard)
        return tuple(f"{self.name}-{number:06d}.tar" for number in range(count))


@dataclass(frozen=True)
class Plan:
    """All that a worker has to know."""

    parts: tuple[PlannedPart, ...]
    classes: tuple[str, ...] | None
    encoding: Encoding
    out: Path

    @property
    def num_samples(self) -> int:
        return sum(len(part.order) for part in self.parts)

    @property
    def shard_names(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.shard_names)

    def part_of(self, shard: str) -> PlannedPart:
        return next(part for part in self.parts if part.name == shard.partition("-")[0])

    def rows(self, shard: str) -> range:
        """Positions in the order of its part."""
        part = self.part_of(shard)
        start = int(shard.removesuffix(".tar").rpartition("-")[2]) * part.samples_per_shard
        return range(start, min(start + part.samples_per_shard, len(part.order)))

    def key(self, part: PlannedPart, position: int) -> str:
        width = max(8, len(str(self.num_samples - 1)))
        return f"{part.first + position:0{width}d}"


def write_shards(
    plan: Plan,
    names: Sequence[str],
    workers: int,
    on_shard: Callable[[Sequence[Fault]], None],
    report: Callable[[int, int], None],
) -> None:
    """Writes the shards ``names`` and their records.

    Whatever ends this early, also Ctrl-C or an error from ``on_shard``, leaves complete shards only.

    Args:
        on_shard: called with the faults of each, in the order in which they are finished.
        report: called several times a second with the numbers of images and shards done.

    Raises:
        UserError: a shard cannot be written.
    """
    if not names:
        return
    # A copy of the input for each process would cost memory; forked ones share it.
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    stop, images = context.Event(), context.Value("q", 0)
    pool = ProcessPoolExecutor(
        min(workers, len(names)), context, _start_worker, (plan, stop, images, os.getpid())
    )
    done = 0
    try:
        pending: set[Future[tuple[Fault, ...]]] = {pool.submit(_write_shard, name) for name in names}
        while pending:
            finished, pending = wait(pending, INTERVAL, FIRST_COMPLETED)
            for future in finished:
                on_shard(future.result())
            done += len(finished)
            report(images.value, done)
    except BrokenProcessPool:
        raise UserError(
            "a worker process was ended from outside (out of memory?); run the same command again, "
            "with fewer --workers"
        ) from None
    finally:
        stop.set()  # also tells the workers to drop what they are at
        pool.shutdown(cancel_futures=True)


class _Stopped(Exception):
    """The shard is not wanted any more."""


@dataclass(frozen=True)
class _Worker:
    plan: Plan
    stop: Any  # multiprocessing's Event
    images: Any  # multiprocessing's Value: images done by all workers


_worker: _Worker | None = None  # of this process


def _start_worker(plan: Plan, stop: Any, images: Any, parent: int) -> None:
    global _worker
    _worker = _Worker(plan, stop, images)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which tells the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # The pool has a process per core, and threads of a forked process cannot use the parent's.
    torch.set_num_threads(1)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process soon after its parent, which may have been killed."""
    while os.getppid() == parent:
        time.sleep(INTERVAL)
    os._exit(1)


def _write_shard(name: str) -> tuple[Fault, ...]:
    worker = _worker
    assert worker is not None, "set when the process starts"
    path = worker.plan.out / name
    try:
        record = _fill(path, worker)
        write_record(path, record)
    except OSError as error:  # of reading, it would be a BadSample
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None
    return record.faults


def _fill(path: Path, worker: _Worker) -> Record:
    plan = worker.plan
    part = plan.part_of(path.name)
    rows: list[Row] = []
    faults: list[Fault] = []
    with open_shard(path) as shard:
        for position in plan.rows(path.name):
            if worker.stop.is_set():
                raise _Stopped
            index = part.order[position]
            source = part.images.names[index]
            try:
                picture, label = part.images.read(index)
                image = encode(picture, source, plan.encoding)
            except BadSample as bad:
                faults.append(Fault(source, bad.kind, bad.reason))
            else:
                about: dict[str, str | int] = {} if label < 0 else {"label": label}
                if label >= 0 and plan.classes is not None:
                    about["name"] = plan.classes[label]
                about |= {"source": source, "width": image.width, "height": image.height}
                rows.append(add_sample(shard, plan.key(part, position), image, label, about))
            with worker.images.get_lock():
                worker.images.value += 1
    if not rows:
        path.unlink()
    return Record(path.name, shard.num_bytes, shard.sha256, tuple(rows), tuple(faults))
