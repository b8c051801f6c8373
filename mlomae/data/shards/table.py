"""What is known of the shards of a part: where each sample's image lies, and its label."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import overload

import numpy as np
import torch
from torch import Tensor

from mlomae.data.faults import Fault
from mlomae.data.urls import shard_name


class PackedStrings(Sequence[str]):
    """Many strings in two arrays: a list of a million of them takes 100 MB in every loader process."""

    def __init__(self, blob: bytes, ends: np.ndarray) -> None:
        """
        Args:
            blob: all strings in UTF-8, one behind another.
            ends: int64 [N], where each ends.
        """
        self._blob = blob
        self._ends = ends

    @classmethod
    def pack(cls, strings: Iterable[str]) -> PackedStrings:
        pieces = [_encode(string) for string in strings]
        return cls(b"".join(pieces), np.cumsum([len(piece) for piece in pieces], dtype=np.int64))

    @classmethod
    def join(cls, parts: Sequence[PackedStrings]) -> PackedStrings:
        starts = np.cumsum([0, *(len(part.blob) for part in parts)])
        ends = [part.ends + start for part, start in zip(parts, starts, strict=False)]
        return cls(b"".join(part.blob for part in parts), np.concatenate([np.zeros(0, np.int64), *ends]))

    @property
    def blob(self) -> bytes:
        return self._blob

    @property
    def ends(self) -> np.ndarray:
        return self._ends

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        index = range(len(self))[index]  # negative ones, and IndexError
        start = int(self._ends[index - 1]) if index else 0
        return _decode(self._blob[start : int(self._ends[index])])

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self._ends.tolist():
            yield _decode(self._blob[start:end])
            start = end

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"PackedStrings({len(self)} strings)"


@dataclass(frozen=True)
class Shard:
    """A tar file: where it lies and what it holds."""

    url: str
    num_samples: int
    num_bytes: int
    sha256: str | None = None


@dataclass(frozen=True)
class SampleTable:
    """The samples of a part, in the order of its shards and of their members; all tensors int64 [N].

    Attributes:
        keys: ``<shard name>/<sample key>``, unique.
        shards: number of the shard.
        offsets, sizes: where the image's bytes lie in it.
        labels: class number, or -1 where a sample has none.
    """

    keys: Sequence[str]
    shards: Tensor
    offsets: Tensor
    sizes: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class ShardIndex:
    """The shards of a part, their usable samples and the faults of others."""

    shards: tuple[Shard, ...]
    samples: SampleTable
    classes: tuple[str, ...] | None = None
    faults: tuple[Fault, ...] = field(default=())

    def count_all(self, shard: Shard) -> int:
        """Samples of a shard, unusable ones included, as other programs count them."""
        prefix = f"{shard_name(shard.url)}/"
        faults = [fault for fault in self.faults if fault.key.startswith(prefix)]
        # A duplicate is a member of a sample that counts already.
        return shard.num_samples + sum(fault.kind != "duplicate" for fault in faults)


def join_indexes(indexes: Sequence[ShardIndex]) -> ShardIndex:
    """One index of all shards; the shards are numbered already."""
    tables = [index.samples for index in indexes]
    empty = torch.zeros(0, dtype=torch.int64)
    return ShardIndex(
        tuple(shard for index in indexes for shard in index.shards),
        SampleTable(
            PackedStrings.join(
                [t.keys if isinstance(t.keys, PackedStrings) else PackedStrings.pack(t.keys) for t in tables]
            ),
            torch.cat([empty, *(table.shards for table in tables)]),
            torch.cat([empty, *(table.offsets for table in tables)]),
            torch.cat([empty, *(table.sizes for table in tables)]),
            torch.cat([empty, *(table.labels for table in tables)]),
        ),
        faults=tuple(fault for index in indexes for fault in index.faults),
    )


def _encode(string: str) -> bytes:
    return string.encode("utf-8", "surrogateescape")  # as names in tar files are read


def _decode(content: bytes) -> str:
    return content.decode("utf-8", "surrogateescape")
