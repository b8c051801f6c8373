"""The index of shards from their headers: samples are grouped by WebDataset's key rule."""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from mlomae.data.faults import BadSample, Fault
from mlomae.data.shards.table import PackedStrings, SampleTable, Shard, ShardIndex, join_indexes
from mlomae.data.shards.tar_members import FileSource, Source, StreamSource, iterate_members
from mlomae.data.urls import is_remote, open_stream, shard_name, with_retries
from mlomae.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MAX_LABEL = 2**31 - 1
MAX_LABEL_BYTES = {"cls": 64, "json": 16 << 20}

# WebDataset's rule: the key ends at the first dot of the file name. Metadata (__meta__.json, __meta__/x)
# are no samples, nor are hidden files, to which its rule gives the key "folder/".
_KEY = re.compile(r"(?!__[^/]*__(?:$|[/.]))((?:.*/|)[^.]+(?<!/))[.]([^/]*)$")

# Offset, size, and the content where it may hold a label; named tuples would keep the garbage collector busy.
Part = tuple[int, int, bytes | None]


def scan(urls: Sequence[str], workers: int = 8, checksums: bool = False) -> ShardIndex:
    """The index of all shards ``urls``.

    Args:
        urls: local ones are scanned one after another.
        workers: remote shards that are read at the same time.
        checksums: reads local shards whole, for their sha256.

    Raises:
        UserError: as ``scan_shard``, or two shards have one name.
    """
    named: dict[str, str] = {}
    for url in urls:
        name = shard_name(url)
        if name in named:
            raise UserError(f"{url}: {named[name]} has the same name; sample keys need a name for each shard")
        named[name] = url
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        pending = [
            pool.submit(scan_shard, url, number) if is_remote(url) else None
            for number, url in enumerate(urls)
        ]
        indexes = [
            scan_shard(url, number, checksums) if future is None else future.result()
            for number, (url, future) in enumerate(zip(urls, pending, strict=True))
        ]
    finally:
        pool.shutdown(cancel_futures=True)
    return join_indexes(indexes)


def scan_shard(url: str, number: int = 0, checksum: bool = False) -> ShardIndex:
    """The index of one shard, which has ``number`` among its siblings.

    A sample that cannot be used is a fault instead (see ``_Samples``). Of a local shard only headers and
    labels are read unless its ``checksum`` is wanted; a remote one is read once from begin to end.

    Raises:
        UserError: the shard cannot be read, is not a tar file, or damaged.
    """

    def attempt() -> ShardIndex:
        with open_stream(url) as stream:
            if is_remote(url) or checksum:
                source = StreamSource(stream)
                samples = _Samples(name, source)
                shard = Shard(url, samples.count, source.num_bytes, source.sha256)
            else:
                samples = _Samples(name, FileSource(stream))
                shard = Shard(url, samples.count, os.fstat(stream.fileno()).st_size)
            return ShardIndex((shard,), samples.table(number), faults=tuple(samples.faults))

    name = shard_name(url)
    try:
        return with_retries(attempt, url)
    except tarfile.TarError as error:
        raise UserError(f"{url}: not a complete tar file ({error}); write or copy the shard again") from None


class _Samples:
    """Groups the members of one shard.

    Attributes:
        faults: of samples that are left out (kinds "path", "no-image", "label"), and of members
            that are, because another one has the same name ("duplicate").
    """

    def __init__(self, shard: str, source: Source) -> None:
        self._shard = shard
        self.faults: list[Fault] = []
        self._keys: list[str] = []
        self._links: dict[str, str] = {}  # {sample key: member that should be its image}
        self._rows: list[tuple[int, int, int]] = []
        for key, parts in self._group(source).items():
            try:
                row = (*_find_image(parts, self._links.get(key)), _find_label(parts))
            except BadSample as bad:
                self._add_fault(key, bad)
            else:
                self._keys.append(f"{shard}/{key}")
                self._rows.append(row)

    @property
    def count(self) -> int:
        return len(self._keys)

    def table(self, number: int) -> SampleTable:
        rows = torch.tensor(self._rows, dtype=torch.int64).reshape(-1, 3)
        offsets, sizes, labels = (column.clone() for column in rows.unbind(1))
        shards = torch.full_like(offsets, number)
        return SampleTable(PackedStrings.pack(self._keys), shards, offsets, sizes, labels)

    def _group(self, source: Source) -> dict[str, dict[str, Part]]:
        """{sample key: {suffix: part}}"""
        samples: dict[str, dict[str, Part]] = {}
        misplaced: set[str] = set()
        for member in iterate_members(source):
            match = _KEY.match(member.name)
            if match is None or member.is_folder:
                continue
            key, suffix = match[1], match[2].lower()
            if not (member.is_file or suffix in IMAGE_SUFFIXES):
                continue
            if key.startswith("/") or ".." in key.split("/"):
                if key not in misplaced:
                    misplaced.add(key)
                    self._add_fault(key, BadSample("path", f"{member.name!r} leaves the folder of the shard"))
                continue
            parts = samples.setdefault(key, {})
            if not member.is_file:
                self._links[key] = member.name
                continue
            if suffix in parts:
                self._add_fault(key, BadSample("duplicate", f"a second member is called {member.name!r}"))
                continue
            has_label = member.size <= MAX_LABEL_BYTES.get(suffix, -1)
            content = source.read(member.offset, member.size) if has_label else None
            parts[suffix] = (member.offset, member.size, content)
        return samples

    def _add_fault(self, key: str, bad: BadSample) -> None:
        self.faults.append(Fault(f"{self._shard}/{key}", bad.kind, bad.reason))


def _find_image(parts: dict[str, Part], link: str | None) -> tuple[int, int]:
    """Offset and size."""
    for suffix in IMAGE_SUFFIXES:
        if suffix in parts:
            return parts[suffix][:2]
    if link is not None:
        raise BadSample("no-image", f"{link!r} is a link or a device, not a file")
    raise BadSample("no-image", f"only {', '.join(parts)}; expected one of {', '.join(IMAGE_SUFFIXES)}")


def _find_label(parts: dict[str, Part]) -> int:
    """The class number in ``.cls``, or else ``label`` in ``.json``; -1 where there is neither."""
    for suffix, expected in (("cls", "a class number"), ("json", '{"label": class number}')):
        if suffix not in parts:
            continue
        _, size, content = parts[suffix]
        try:
            if content is None:
                raise ValueError
            label = _parse_number(content) if suffix == "cls" else json.loads(content).get("label")
            if label is not None and (type(label) is not int or not 0 <= label <= MAX_LABEL):
                raise ValueError
        except (ValueError, AttributeError, RecursionError):
            found = f"{size} bytes" if content is None else repr(content[:40])
            raise BadSample("label", f".{suffix} holds {found}, expected {expected}") from None
        if label is not None:
            return label
    return -1


def _parse_number(content: bytes) -> int:
    if not content.strip().isdigit():  # int() also takes signs and underscores
        raise ValueError
    return int(content)
