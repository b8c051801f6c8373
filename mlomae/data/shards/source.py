"""WebDataset shards as a source: by random access where they are files, else read front to back."""

from __future__ import annotations

import os
from collections.abc import Sequence
from threading import Lock
from typing import Any, BinaryIO, Protocol

from torch import Tensor

from mlomae.data.faults import BadSample
from mlomae.data.shards.table import SampleTable, ShardIndex
from mlomae.data.urls import is_remote, local_path, open_stream, with_retries

MAX_OPEN = 128  # descriptors kept per reader and process, well below the usual limit of 1024
_HEADER = 512  # bytes of the header before a member's content
_PIECE = 2**20  # bytes read at once where a stream is passed over


class Reader(Protocol):
    """Reads samples of shards."""

    def content(self, index: int) -> bytes:
        """The encoded image of one sample.

        What is read is checked against the index: a shard that has changed since gives no wrong sample.

        Raises:
            BadSample: the shard holds something else at its place.
            UserError: the shard cannot be read, or is too short.
        """

    def close(self) -> None:
        """Gives back what is open; the next read opens it again."""


class ShardSource:
    """The samples of an index; a key is ``<shard>/<sample key>``.

    Attributes:
        index: of the shards.
        remote: whether they are read front to back; a jump backwards opens a shard again.
    """

    stack: None = None

    def __init__(self, index: ShardIndex) -> None:
        self.index = index
        self.remote = any(is_remote(shard.url) for shard in index.shards)
        self.keys: Sequence[str] = index.samples.keys
        labels = index.samples.labels
        self.labels: Tensor | None = labels if bool((labels >= 0).any()) else None
        self._reader: Reader = StreamReader(index) if self.remote else FileReader(index)

    def __len__(self) -> int:
        return len(self.keys)

    def content(self, index: int) -> bytes:
        return self._reader.content(index)

    def open_reader(self) -> Reader:
        """A reader for one who goes front to back; those of files are shared, they have no place."""
        return StreamReader(self.index) if self.remote else self._reader

    def close(self) -> None:
        """Gives connections and descriptors back; the next read opens them again."""
        self._reader.close()


class FileReader:
    """Positioned reads of shards that are files; threads and forked processes may share one."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index
        self._extents = _Extents(index.samples)
        self._descriptors: dict[int, int] = {}
        self._lock = Lock()

    def content(self, index: int) -> bytes:
        shard, offset, size = self._extents[index]
        url = self._index.shards[shard].url

        def read() -> bytes:
            with self._lock:  # another thread may close a descriptor to make room
                try:
                    descriptor = self._descriptor(shard, url)
                    block = os.pread(descriptor, _HEADER + size, offset - _HEADER)
                    if len(block) < _HEADER + size:
                        end = os.fstat(descriptor).st_size
                        raise EOFError(f"it ends at byte {end}, before {offset + size}")
                    return block
                except (OSError, EOFError):
                    self._drop(shard)  # the next attempt opens it again: it may have been replaced
                    raise

        return _checked(self._index.samples.keys[index], with_retries(read, url))

    def _descriptor(self, shard: int, url: str) -> int:
        # A forked worker may share these: a positioned read has no file position to fight over.
        if shard not in self._descriptors:
            if len(self._descriptors) >= MAX_OPEN:
                self._drop(next(iter(self._descriptors)))
            self._descriptors[shard] = os.open(local_path(url), os.O_RDONLY)
        return self._descriptors[shard]

    def close(self) -> None:
        with self._lock:
            for shard in list(self._descriptors):
                self._drop(shard)

    def _drop(self, shard: int) -> None:
        if shard in self._descriptors:
            os.close(self._descriptors.pop(shard))

    def __reduce__(self) -> tuple[Any, ...]:
        return FileReader, (self._index,)  # a spawned worker opens its own

    def __del__(self) -> None:
        self.close()


class StreamReader:
    """Reads shards front to back, wherever they come from; one is open at a time."""

    def __init__(self, index: ShardIndex) -> None:
        self._index = index
        self._extents = _Extents(index.samples)
        self._stream: BinaryIO | None = None
        self._shard, self._position, self._process = -1, 0, os.getpid()
        self._lock = Lock()

    def content(self, index: int) -> bytes:
        shard, offset, size = self._extents[index]
        url = self._index.shards[shard].url

        def read() -> bytes:
            try:
                stream = self._seek(shard, url, offset - _HEADER)
                return self._read(stream, _HEADER + size)
            except BaseException:
                self.close()  # the next attempt opens it again
                raise

        with self._lock:
            return _checked(self._index.samples.keys[index], with_retries(read, url))

    def close(self) -> None:
        if self._stream is not None and self._process == os.getpid():
            self._stream.close()
        self._stream = None

    def _seek(self, shard: int, url: str, position: int) -> BinaryIO:
        # A fork must leave its parent's connection alone.
        continues = self._process == os.getpid() and shard == self._shard and position >= self._position
        if self._stream is None or not continues:
            self.close()
            self._stream = open_stream(url)
            self._shard, self._position, self._process = shard, 0, os.getpid()
        while self._position < position:
            self._read(self._stream, min(_PIECE, position - self._position))
        return self._stream

    def _read(self, stream: BinaryIO, size: int) -> bytes:
        parts: list[bytes] = []
        missing = size
        while missing:
            part = stream.read(missing)
            if not part:
                raise EOFError(f"it ends at byte {self._position}, before {self._position + missing}")
            parts.append(part)
            missing -= len(part)
            self._position += len(part)
        return b"".join(parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return StreamReader, (self._index,)

    def __del__(self) -> None:
        self.close()


class _Extents:
    """By sample: shard number, and where the image's bytes lie in the shard: offset and size."""

    def __init__(self, samples: SampleTable) -> None:
        # Numbers come out of arrays ten times as fast as out of tensors.
        self._columns = [column.numpy() for column in (samples.shards, samples.offsets, samples.sizes)]

    def __getitem__(self, sample: int) -> tuple[int, int, int]:
        shards, offsets, sizes = self._columns
        return int(shards[sample]), int(offsets[sample]), int(sizes[sample])


def _checked(key: str, block: bytes) -> bytes:
    """What follows a tar header, if the header names the sample."""
    name = (key.partition("/")[2] + ".").encode("utf-8", "surrogateescape")
    # A longer name, or one of other letters, stands elsewhere.
    if len(name) < 90 and name.isascii():
        prefix = block[345:500].rstrip(b"\0") if block[257:262] == b"ustar" else b""
        found = (prefix + b"/" if prefix else b"") + block[:100]
        if not found.startswith(name):
            raise BadSample(
                "misplaced", "its shard holds something else at its place; index the shards again"
            )
    return block[_HEADER:]
