"""Local WebDataset shards with random access: one header pass, then positioned reads."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any, BinaryIO

import torch
from torch import Tensor

from mlomae.data.images import decode_image
from mlomae.errors import UserError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp")
MAX_OPEN = 128  # descriptors kept per source and process, well below the usual limit of 1024

Extent = tuple[int, int]  # offset and size in bytes within a shard


class ShardSource:
    """All samples of the tar files ``names`` in ``root``; a key is ``<shard>/<sample key>``.

    A label is the integer in ``.cls``, or ``label`` in ``.json``.

    Raises:
        UserError: a shard is damaged, a sample lacks an image, or only some samples have a label.
    """

    stack: None = None

    def __init__(self, root: Path, names: Sequence[str], in_chans: int) -> None:
        self._paths = [root / name for name in names]
        self._in_chans = in_chans
        self._descriptors: dict[int, int] = {}
        self._lock = Lock()
        self.keys: list[str] = []
        extents: list[tuple[int, int, int]] = []
        labels: list[int | None] = []
        for number, path in enumerate(self._paths):
            for key, image, label in _read_index(path):
                self.keys.append(f"{path.name}/{key}")
                extents.append((number, *image))
                labels.append(label)
        if not self.keys:
            raise UserError(f"data.path: no samples in {root}/{names[0]} and its siblings; expected images")
        self._extents = torch.tensor(extents)
        known = [label for label in labels if label is not None]
        if known and len(known) < len(labels):
            key = self.keys[labels.index(None)]
            raise UserError(
                f"{root}/{key}: has no label although others have; add its .cls, or remove all labels"
            )
        self.labels = torch.tensor(known) if known else None

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> Tensor:
        """uint8 [C, H, W]."""
        shard, offset, size = self._extents[index].tolist()
        with self._lock:  # another thread may close a descriptor to make room
            content = os.pread(self._descriptor(shard), size, offset)
        name = f"{self._paths[shard].parent}/{self.keys[index]}"
        return decode_image(io.BytesIO(content), self._in_chans, name)

    def _descriptor(self, shard: int) -> int:
        # A forked worker may share these: a positioned read has no file position to fight over.
        if shard not in self._descriptors:
            if len(self._descriptors) >= MAX_OPEN:
                os.close(self._descriptors.pop(next(iter(self._descriptors))))
            try:
                self._descriptors[shard] = os.open(self._paths[shard], os.O_RDONLY)
            except OSError as error:
                raise UserError(f"{self._paths[shard]}: cannot be opened ({error.strerror})") from None
        return self._descriptors[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptors": {}, "_lock": None}  # a spawned worker opens its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=Lock())

    def __del__(self) -> None:
        for descriptor in self._descriptors.values():
            os.close(descriptor)


def list_shards(root: Path, part: str) -> tuple[str, ...]:
    """Sorted names of ``<part>-*.tar`` in ``root``."""
    return tuple(sorted(path.name for path in root.glob(f"{part}-*.tar")))


def _read_index(path: Path) -> list[tuple[str, Extent, int | None]]:
    """(key, extent of the image, label) of each sample of one shard, in file order."""
    try:
        with path.open("rb") as file:
            samples = _group_members(path, file)
            return [
                (key, _image(path, key, parts), _label(file, path, key, parts))
                for key, parts in samples.items()
            ]
    except tarfile.TarError as error:
        raise UserError(f"{path}: not a complete tar file ({error}); write or copy the shard again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _group_members(path: Path, file: BinaryIO) -> dict[str, dict[str, Extent]]:
    """{sample key: {suffix: extent}} from the headers alone, grouped by WebDataset's key rule."""
    from webdataset.tariterators import base_plus_ext

    samples: dict[str, dict[str, Extent]] = {}
    with tarfile.open(fileobj=file, mode="r:") as tar:
        for member in tar:
            key, suffix = base_plus_ext(member.name)
            if not member.isfile() or key is None:
                continue
            parts = samples.setdefault(key, {})
            if suffix.lower() in parts:
                raise UserError(f"{path}: two members are called {member.name}; sample keys must be unique")
            parts[suffix.lower()] = (member.offset_data, member.size)
        end = tar.offset
    # tarfile takes a cut between members, or a damaged later header, for the end of the archive.
    block = os.pread(file.fileno(), tarfile.BLOCKSIZE, end)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise tarfile.ReadError(f"no end-of-archive mark at byte {end}")
    return samples


def _image(path: Path, key: str, parts: dict[str, Extent]) -> Extent:
    for suffix in IMAGE_SUFFIXES:
        if suffix in parts:
            return parts[suffix]
    expected = ", ".join(IMAGE_SUFFIXES)
    raise UserError(
        f"{path}: sample {key!r} has no image, only {', '.join(parts)}; expected one of {expected}"
    )


def _label(file: BinaryIO, path: Path, key: str, parts: dict[str, Extent]) -> int | None:
    for suffix in ("cls", "json"):
        if suffix not in parts:
            continue
        offset, size = parts[suffix]
        content = os.pread(file.fileno(), size, offset)
        try:
            label = int(content) if suffix == "cls" else json.loads(content).get("label")
            if label is not None and (type(label) is not int or label < 0):
                raise ValueError
        except (ValueError, AttributeError):
            expected = "a class number" if suffix == "cls" else '{"label": class number}'
            raise UserError(f"{path}: {key}.{suffix} holds {content[:40]!r}, expected {expected}") from None
        if label is not None:
            return label
    return None
