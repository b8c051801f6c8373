"""One shard on its way to the disk: a tar file whose bytes depend on its samples only, and a record of it."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

from mlomae.data.faults import Fault
from mlomae.run_dir import replacing, write_atomically
from mlomae.sharding.encoding import Encoded

Row = tuple[str, int, int, int]  # sample key, offset and size of its image, label


@dataclass(frozen=True)
class Record:
    """What a finished shard holds; a shard without any good sample has no file.

    Attributes:
        name: of the shard.
        num_bytes, sha256: of the file.
        rows: its samples.
        faults: samples that are left out; keys are the names of their sources.
    """

    name: str
    num_bytes: int
    sha256: str
    rows: tuple[Row, ...]
    faults: tuple[Fault, ...]


class ShardFile:
    """Writes a tar file of plain members without owner and time, and hashes what it writes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    @property
    def sha256(self) -> str:
        return self._digest.hexdigest()

    def add(self, name: str, content: bytes) -> int:
        """Appends a member; returns where its content begins."""
        header = tarfile.TarInfo(name)
        header.size = len(content)
        self._write(header.tobuf(tarfile.USTAR_FORMAT))
        offset = self.num_bytes
        self._write(content)
        self._write(bytes(-len(content) % tarfile.BLOCKSIZE))
        return offset

    def finish(self) -> None:
        """Writes the mark that ends an archive."""
        self._write(bytes(2 * tarfile.BLOCKSIZE))

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._digest.update(content)
        self.num_bytes += len(content)


@contextmanager
def open_shard(path: Path) -> Iterator[ShardFile]:
    """A shard that appears under its name once it is complete and on the disk; otherwise nothing is left."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        shard = ShardFile(file)
        yield shard
        shard.finish()
        file.flush()
        os.fsync(file.fileno())


def add_sample(shard: ShardFile, key: str, image: Encoded, label: int, about: Mapping[str, str | int]) -> Row:
    """Appends KEY.jpg (or another suffix), KEY.cls where there is a label, and KEY.json.

    Args:
        label: -1: none.
        about: goes into KEY.json.
    """
    offset = shard.add(f"{key}.{image.suffix}", image.content)
    if label >= 0:
        shard.add(f"{key}.cls", str(label).encode())
    shard.add(f"{key}.json", json.dumps(about).encode())
    return key, offset, len(image.content), label


def record_path(shard: Path) -> Path:
    """Where the record of a shard lies until the whole set is complete."""
    return shard.with_name(f".{shard.name}.done.json")


def write_record(shard: Path, record: Record) -> None:
    write_atomically(record_path(shard), json.dumps(asdict(record)).encode())


def read_record(shard: Path) -> Record | None:
    """The record of a finished shard; None where there is none, or the shard is not as it says."""
    try:
        entry = json.loads(record_path(shard).read_text())
        rows = tuple(
            (str(key), int(offset), int(size), int(label)) for key, offset, size, label in entry["rows"]
        )
        faults = tuple(Fault(**fault) for fault in entry["faults"])
        record = Record(entry["name"], entry["num_bytes"], entry["sha256"], rows, faults)
        if rows and shard.stat().st_size != record.num_bytes:
            return None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return record
