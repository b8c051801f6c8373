"""Makes shards of a data set, in several processes; a run that was cut short is continued.

    train-000000.tar …       shards; their bytes depend on the input and the options only
    classes.json             class names, where there are any
    bad_samples.jsonl        samples that were left out, and why
    create.json              what the shards are made of
    train-index.json, .npz   the index of a part; written last: where every part has one, the set is complete

Until then every finished shard has a hidden record, by which a later run knows that it is done.
"""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

import torch

from mlomae.data.faults import Fault, count_kinds
from mlomae.data.shards.index import read_index, write_index
from mlomae.data.shards.table import PackedStrings, SampleTable, Shard, ShardIndex, join_indexes
from mlomae.data.splits import key_digest
from mlomae.data.urls import local_path
from mlomae.errors import UserError
from mlomae.run_dir import first_few, temporary_for, write_atomically
from mlomae.sharding.encoding import Encoding
from mlomae.sharding.inputs import Inputs
from mlomae.sharding.pool import Plan, PlannedPart, write_shards
from mlomae.sharding.shard_file import Record, read_record, record_path

DESCRIPTION, CLASSES, BAD_SAMPLES, LOCK = "create.json", "classes.json", "bad_samples.jsonl", ".lock"
PATIENCE = 5.0  # seconds that the processes of a killed run are given to notice it
VERSION = 1  # of create.json

Report = Callable[[int, int, int, int], None]
"""Called several times a second with images done, of how many, shards done, of how many."""


@dataclass(frozen=True)
class Layout:
    """How samples are put into shards.

    Attributes:
        samples_per_shard: bad ones included.
        seed: of the order; None keeps the order of the input.
    """

    samples_per_shard: int = 1000
    seed: int | None = 0


@dataclass(frozen=True)
class Created:
    """A complete set of shards.

    Attributes:
        parts: {name: index}.
        faults: samples that were left out; keys are the names of their sources.
        num_written: samples that this run has looked at; 0 when the set was complete before.
    """

    parts: dict[str, ShardIndex]
    faults: tuple[Fault, ...]
    num_written: int


def create_shards(
    inputs: Inputs,
    out: Path,
    encoding: Encoding,
    layout: Layout,
    workers: int,
    max_bad_share: float,
    report: Report,
) -> Created:
    """Writes the shards that ``out`` does not hold yet, and then the indexes.

    Args:
        workers: processes; their number changes no byte.
        max_bad_share: of all samples that may be bad.

    Raises:
        UserError: ``out`` holds something else, cannot be written or is in use; or too many samples are bad.
    """
    plan = _make_plan(inputs, out, encoding, layout)
    description = _describe(inputs, encoding, layout)
    try:
        out.mkdir(parents=True, exist_ok=True)
        with _lock(out):
            _compare(out, description)
            if all(_index_path(out, part).exists() for part in inputs.parts):
                created = Created(_read_indexes(out, inputs), _read_faults(out), 0)
            else:
                _refuse_foreign_files(out, plan)
                write_atomically(out / DESCRIPTION, description.encode())
                created = _continue(plan, workers, _Limit(max_bad_share, plan.num_samples, out), report)
            _sweep(out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: cannot be written ({error.strerror})") from None
    return created


class _Limit:
    """Takes down bad samples, and stops when there are too many."""

    def __init__(self, share: float, num_samples: int, out: Path) -> None:
        self._share = share
        self._num_samples = num_samples
        self._path = out / BAD_SAMPLES
        self.faults: list[Fault] = []

    def add(self, faults: Iterable[Fault]) -> None:
        """
        Raises:
            UserError: too many are bad.
        """
        self.faults += faults
        if self.is_exceeded(self.faults):
            self.write()
            raise UserError(
                f"--max-bad-share: {len(self.faults)} of {self._num_samples} images are bad so far "
                f"({count_kinds(self.faults)}), more than {self._share:g} allows; see {self._path}, then "
                "repair them, or raise the share"
            )

    def is_exceeded(self, faults: Sequence[Fault]) -> bool:
        return len(faults) > self._share * self._num_samples

    def write(self) -> None:
        """Names them all in a file, where there are any."""
        self.faults.sort(key=lambda fault: fault.key)
        if self.faults:
            lines = [json.dumps(asdict(fault)) + "\n" for fault in self.faults]
            write_atomically(self._path, "".join(lines).encode())
        else:
            self._path.unlink(missing_ok=True)


def _continue(plan: Plan, workers: int, limit: _Limit, report: Report) -> Created:
    """Writes what is missing of a set whose description is in place."""
    known = {name: record.faults for name in plan.shard_names if (record := read_record(plan.out / name))}
    if limit.is_exceeded([fault for faults in known.values() for fault in faults]):
        # A run has stopped at them. They may have been repaired since.
        known = {name: faults for name, faults in known.items() if not faults}
    missing = [name for name in plan.shard_names if name not in known]
    for faults in known.values():
        limit.add(faults)
    num_samples, num_shards = sum(len(plan.rows(name)) for name in missing), len(plan.shard_names)
    write_shards(
        plan,
        missing,
        workers,
        limit.add,
        lambda images, shards: report(images, num_samples, len(known) + shards, num_shards),
    )
    if plan.classes is not None:
        write_atomically(plan.out / CLASSES, json.dumps(plan.classes, indent=0).encode())
    limit.write()
    indexes = {part.name: _index_of(part, plan) for part in plan.parts}
    for name, index in indexes.items():
        write_index(_index_path(plan.out, name), index)
    return Created(indexes, tuple(limit.faults), num_samples)


def _make_plan(inputs: Inputs, out: Path, encoding: Encoding, layout: Layout) -> Plan:
    parts, first = [], 0
    for name, images in inputs.parts.items():
        order = _order(images.names, layout.seed)
        parts.append(PlannedPart(name, images, order, layout.samples_per_shard, first))
        first += len(order)
    return Plan(tuple(parts), inputs.classes, encoding, out)


def _order(names: Sequence[str], seed: int | None) -> list[int]:
    """Sample numbers in the order in which they are written."""
    if seed is None:
        return list(range(len(names)))
    # By hashes, as splits are drawn: the same on every machine and with every release of a library.
    digests = [key_digest(str(seed), name) for name in names]
    return sorted(range(len(names)), key=digests.__getitem__)


def _describe(inputs: Inputs, encoding: Encoding, layout: Layout) -> str:
    """The content of create.json: whatever decides about the bytes of the set."""
    parts = {
        name: {"samples": len(images.names), "digest": images.digest()}
        for name, images in inputs.parts.items()
    }
    description = {
        "version": VERSION,
        "source": inputs.source,
        **asdict(layout),
        **asdict(encoding),
        "parts": parts,
        "classes": inputs.classes,
    }
    return json.dumps(description, indent=1) + "\n"


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Keeps other processes out of the folder.

    Forked workers share the lock on purpose: after a kill of this process it holds until they are gone.
    """
    deadline = time.monotonic() + PATIENCE
    while (lock := _try_lock(out / LOCK)) is None:
        if time.monotonic() > deadline:
            raise UserError(f"{out}: another process writes shards there; wait for it")
        time.sleep(0.1)
    with lock:
        try:
            yield
        finally:
            (out / LOCK).unlink(missing_ok=True)


def _try_lock(path: Path) -> TextIO | None:
    """The locked file; None while another process has it."""
    with ExitStack() as stack:
        lock = stack.enter_context(path.open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before may have removed the file that was opened here.
            is_current = os.path.samestat(os.fstat(lock.fileno()), path.stat())
        except (BlockingIOError, FileNotFoundError):
            return None
        if is_current:
            stack.pop_all()
            return lock
    return None


def _compare(out: Path, description: str) -> None:
    """Raises UserError where the folder holds another set, or none but other files."""
    found = {entry.name for entry in out.iterdir()} - {LOCK, temporary_for(Path(DESCRIPTION)).name}
    if DESCRIPTION in found:
        differences = _differences(out / DESCRIPTION, description)
        if differences:
            raise UserError(
                f"{out}: holds shards that are made differently ({first_few(differences)}); "
                "choose another folder, or delete it"
            )
    elif found:
        raise UserError(
            f"{out}: holds other files, such as {min(found)}, and no {DESCRIPTION}; choose another folder"
        )


def _differences(path: Path, description: str) -> list[str]:
    """Which fields differ, and how."""
    try:
        before = dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return [f"{DESCRIPTION} cannot be read"]
    now: Mapping[str, Any] = json.loads(description)
    lists = {"parts": "another list of images", "classes": "other classes"}
    return [
        lists.get(name) or f"{name} {before.get(name)} there, {value} here"
        for name, value in now.items()
        if before.get(name) != value
    ]


def _refuse_foreign_files(out: Path, plan: Plan) -> None:
    expected = {LOCK, DESCRIPTION, CLASSES, BAD_SAMPLES, *plan.shard_names}
    expected |= {f"{part.name}-index.{suffix}" for part in plan.parts for suffix in ("json", "npz")}
    expected |= {record_path(Path(name)).name for name in plan.shard_names}
    expected |= {temporary_for(Path(name)).name for name in expected}
    foreign = {entry.name for entry in out.iterdir()} - expected
    if foreign:
        raise UserError(f"{out}: holds {min(foreign)}, which is not of this set; remove it")


def _index_path(out: Path, part: str) -> Path:
    return out / f"{part}-index.json"


def _index_of(part: PlannedPart, plan: Plan) -> ShardIndex:
    """The index of a part's shards, but those in which no sample is good.

    Raises:
        UserError: that is all of them.
    """
    indexes: list[ShardIndex] = []
    for name in part.shard_names:
        record = read_record(plan.out / name)
        if record is None:
            raise UserError(
                f"{plan.out / name}: has changed since it was written; run the same command again"
            )
        if record.rows:
            indexes.append(_index_of_shard(plan.out / name, len(indexes), record))
    if not indexes:
        raise UserError(f"part {part.name}: all {len(part.order)} images are bad; is this the right data?")
    return replace(join_indexes(indexes), classes=plan.classes)


def _index_of_shard(path: Path, number: int, record: Record) -> ShardIndex:
    keys, offsets, sizes, labels = zip(*record.rows, strict=True)
    samples = SampleTable(
        PackedStrings.pack(f"{record.name}/{key}" for key in keys),
        torch.full((len(keys),), number),
        torch.tensor(offsets),
        torch.tensor(sizes),
        torch.tensor(labels),
    )
    return ShardIndex((Shard(str(path), len(keys), record.num_bytes, record.sha256),), samples)


def _read_indexes(out: Path, inputs: Inputs) -> dict[str, ShardIndex]:
    """The indexes of a complete set.

    Raises:
        UserError: a shard has changed since.
    """
    indexes = {part: read_index(str(_index_path(out, part))) for part in inputs.parts}
    for part, index in indexes.items():
        for shard in index.shards:
            path = local_path(shard.url)
            if not path.exists() or path.stat().st_size != shard.num_bytes:
                raise UserError(
                    f"{path}: is missing or has changed since; delete {_index_path(out, part)} and run "
                    "the same command again, which writes the set anew"
                )
    return indexes


def _read_faults(out: Path) -> tuple[Fault, ...]:
    path = out / BAD_SAMPLES
    return tuple(Fault(**json.loads(line)) for line in path.read_text().splitlines()) if path.exists() else ()


def _sweep(out: Path) -> None:
    """Removes the records, and what killed runs left."""
    for entry in os.scandir(out):
        if entry.name.startswith(".") and entry.name.endswith((".done.json", ".tmp")):
            os.unlink(entry)
