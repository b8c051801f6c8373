"""The members of a tar archive, from its headers alone.

Usual headers of files, pax ones among them, are read here, several times faster than tarfile does; whatever
else goes through tarfile, one member at a time. The results are the same.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple, Protocol

BLOCK = tarfile.BLOCKSIZE
WINDOW = 16 << 10  # bytes per positioned read: several small members
CHUNK = 1 << 20  # bytes per read of a stream
MAX_EXTENSION = 1 << 20  # bytes of a long name or of pax records; a few hundred are usual
MAX_OFFSET = 1 << 62
MAX_PADDING = 1 << 20  # zero bytes at the end; up to 10 KiB are usual

# Fields: name, mode, uid, gid, size, mtime, checksum, type (a file, or pax records of the next member), …,
# device numbers, prefix of the name. Numbers are octal.
_USUAL = re.compile(
    rb"(.{100})[0-7 \0]{24}([0-7]{11})[ \0][0-7 \0]{12}([0-7 \0]{8})([0x\0]).{172}[0-7 \0]{16}(.{155}).{12}",
    re.DOTALL,
)
_RECORD = re.compile(rb"(\d{1,7}) ([^=]+)=")


class Member(NamedTuple):
    """One member: ``size`` bytes at ``offset``; only those of a plain file (``is_file``) are its content."""

    name: str
    offset: int
    size: int
    is_file: bool
    is_folder: bool = False


class Source(Protocol):
    """Bytes of an archive."""

    def read(self, offset: int, size: int) -> bytes:
        """Fewer than ``size`` bytes only at the end of the archive."""

    def release(self, offset: int) -> None:
        """Nothing before ``offset`` will be read again."""


class FileSource:
    """A local file: reads only what is asked for, and a little of what follows."""

    def __init__(self, file: BinaryIO) -> None:
        self._descriptor = file.fileno()
        self._start = 0
        self._window = b""

    def read(self, offset: int, size: int) -> bytes:
        first = offset - self._start
        if first < 0 or first + size > len(self._window):
            self._window = os.pread(self._descriptor, max(size, WINDOW), offset)
            self._start, first = offset, 0
        return self._window[first : first + size]

    def release(self, offset: int) -> None:
        """Needs nothing."""


class StreamSource:
    """A stream, read once from its begin; counts and hashes what passes."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._start = 0
        self._buffer = b""
        self._released = 0
        self._digest = hashlib.sha256()

    @property
    def num_bytes(self) -> int:
        """Bytes read so far."""
        return self._start + len(self._buffer)

    @property
    def sha256(self) -> str:
        """Of the bytes read so far."""
        return self._digest.hexdigest()

    def read(self, offset: int, size: int) -> bytes:
        while self.num_bytes < offset + size:
            chunk = self._stream.read(CHUNK)
            if not chunk:
                break
            self._digest.update(chunk)
            surplus = min(self._released - self._start, len(self._buffer))
            self._buffer = self._buffer[surplus:] + chunk
            self._start += surplus
        first = offset - self._start
        assert first >= 0, "released"
        return self._buffer[first : first + size]

    def release(self, offset: int) -> None:
        self._released = offset


def iterate_members(source: Source) -> Iterator[Member]:
    """All members in file order; what lies behind the last one has then been read, too.

    Raises:
        tarfile.TarError: not a tar archive, or damaged, or cut at any byte.
    """
    offset = 0
    global_records: dict[str, str] = {}
    while True:
        source.release(offset)
        header = source.read(offset, BLOCK)
        if len(header) < BLOCK:
            raise tarfile.ReadError(f"it ends at byte {offset + len(header)} without an end-of-archive mark")
        member, following = None, offset
        if not global_records:
            member, following = _read_usual(source, offset, header)
        if member is None:
            if not any(header):
                break
            member, following = _read_any(source, offset, global_records)
        if member.size < 0 or not offset < following < MAX_OFFSET:
            raise tarfile.ReadError(f"an impossible size at byte {offset}")
        offset = following
        # tarfile would let a member reach beyond the end: here the next header is missing then.
        yield member
    _check_padding(source, offset)


def _read_usual(source: Source, offset: int, header: bytes) -> tuple[Member | None, int]:
    """The member at ``offset`` and where the next one begins; no member where tarfile has to look."""
    name: str | None = None
    size: int | None = None
    match = _match(header)
    if match is not None and match[4] == b"x":
        length = int(match[2], 8)
        if length > MAX_EXTENSION:
            return None, 0
        records = _parse_records(source.read(offset + BLOCK, length))
        if records is None:
            return None, 0
        name, size = records
        offset += BLOCK + _whole_blocks(length)
        match = _match(source.read(offset, BLOCK))
        if match is not None and match[4] == b"x":
            return None, 0
    if match is None:
        return None, 0
    encoded, prefix = match[1].partition(b"\0")[0], match[5].partition(b"\0")[0]
    if match[4] == b"\0" and encoded.endswith(b"/"):
        return None, 0  # a folder, as very old tar programs write it
    if name is None:
        name = (prefix + b"/" + encoded if prefix else encoded).decode("utf-8", "surrogateescape")
    if size is None:
        size = int(match[2], 8)
    offset += BLOCK
    return Member(name, offset, size, True), offset + _whole_blocks(size)


def _match(header: bytes) -> re.Match[bytes] | None:
    """Fields of a usual header whose checksum is right."""
    match = _USUAL.fullmatch(header)
    if match is None:
        return None
    field = match[3]
    try:
        expected = int(field.partition(b"\0")[0], 8)
    except ValueError:
        return None
    # The checksum itself counts as eight spaces; most of a header is zeros.
    return match if sum(header.translate(None, b"\0")) - sum(field) + 256 == expected else None


def _parse_records(content: bytes) -> tuple[str | None, int | None] | None:
    """Name and size from pax records, where they are there; None where there is anything unusual."""
    name: str | None = None
    size: int | None = None
    position = 0
    while match := _RECORD.match(content, position):
        length, keyword = int(match[1]), match[2]
        end = position + length
        value = content[match.end() : end - 1]
        if length <= match.end() - position or content[end - 1 : end] != b"\n":
            return None
        if keyword == b"path":
            try:
                name = value.decode("utf-8").rstrip("/")
            except UnicodeDecodeError:
                return None
        elif keyword == b"size":
            if not value.isdigit() or len(value) > 15:
                return None
            size = int(value)
        elif keyword == b"hdrcharset" or keyword.startswith(b"GNU.sparse"):
            return None
        position = end
    return (name, size) if position == len(content) else None


def _read_any(source: Source, offset: int, global_records: dict[str, str]) -> tuple[Member, int]:
    """The same for any header, by tarfile; it adds to ``global_records`` what holds for all later members."""
    try:
        with tarfile.TarFile(
            fileobj=_Window(source, offset),
            encoding="utf-8",
            errors="surrogateescape",
            pax_headers=global_records,
        ) as tar:
            info, following = tar.next(), tar.offset
    except OSError:
        raise
    except Exception as error:  # tarfile lets many kinds pass where numbers or texts make no sense
        raise tarfile.ReadError(f"a damaged header at byte {offset}: {error}") from None
    if info is None:
        raise tarfile.ReadError(f"neither a header nor an end-of-archive mark at byte {offset}")
    is_file = info.isreg() and not info.issparse()
    return Member(info.name, info.offset_data, info.size, is_file, info.isdir()), following


class _Window(io.RawIOBase):
    """What tarfile needs of a file that begins at ``offset``."""

    name = None

    def __init__(self, source: Source, offset: int) -> None:
        super().__init__()
        self._source = source
        self._position = offset

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= MAX_EXTENSION:
            raise tarfile.ReadError(f"{size} bytes of header")
        content = self._source.read(self._position, size)
        self._position += len(content)
        return content

    def tell(self) -> int:
        return self._position

    def seek(self, position: int, whence: int = 0) -> int:
        self._position = position
        return position


def _check_padding(source: Source, offset: int) -> None:
    """Data behind the end-of-archive mark means that the mark is a hole in the file."""
    start = offset
    while block := source.read(offset, CHUNK):
        if any(block):
            raise tarfile.ReadError(f"data behind the end-of-archive mark at byte {start}")
        offset += len(block)
        source.release(offset)
    if offset - start > MAX_PADDING:
        raise tarfile.ReadError(f"{offset - start} zero bytes from byte {start} on")


def _whole_blocks(size: int) -> int:
    return -(-size // BLOCK) * BLOCK
