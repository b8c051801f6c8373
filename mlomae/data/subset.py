"""Some images of a source, read and augmented by row; bad samples are replaced."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeVar

import torch
from torch import Tensor

from mlomae.data.dataset import Source
from mlomae.data.decoding import image_size
from mlomae.data.faults import BadSample, Fault, HopelessError
from mlomae.data.scenes import SceneSource
from mlomae.data.transforms import Augment, augment, augment_maps, fit, load, load_map

# Bad samples in a row after which nothing good is expected any more. Others are far from the first one: a set
# of which only a shard or a folder is bad does not get there.
MAX_IN_A_ROW = 100
Content = TypeVar("Content")


def digest_of_keys(keys: Iterable[str]) -> str:
    """Of names in their order: 16 hex digits."""
    digest = hashlib.sha256()
    for key in keys:
        digest.update(f"{key}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class Loaded:
    """Augmented images and where they come from."""

    images: Tensor  # uint8 [B, C, H, W]
    indices: Tensor  # int64 [B], into the source
    labels: Tensor | None  # int64 [B], or label maps uint8 [B, H, W]
    faults: tuple[Fault, ...] = ()  # of the samples that were passed over


@dataclass(frozen=True)
class Subset:
    """Some images of a source, at one size.

    Attributes:
        source: of the images.
        indices: int64 [n], into the source, ascending, on the device on which images are augmented.
        size: height, width.
        mean, std: per channel, of values in [0, 1].
        resident: whether the images lie decoded on that device (``mlomae.data.resident``).
    """

    source: Source
    indices: Tensor
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    resident: bool = False

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def digest(self) -> str:
        """Of the names of its images: 16 hex digits."""
        return digest_of_keys(self.source.keys[index] for index in self.indices.tolist())

    def read(self, rows: Tensor, kind: Augment, u: Tensor) -> Loaded:
        """Images of ``rows`` [B]; in place of a bad sample stands a good one, which depends on its row only.

        Args:
            u: float32 [B, NUM_UNIFORMS].

        Raises:
            HopelessError: MAX_IN_A_ROW samples are bad.
        """
        if self.source.stack is not None:
            return self._take(rows, kind, u)
        return self.load((substitutes(row, len(self)) for row in rows.tolist()), self.content, kind, u)

    def read_good(self, rows: Tensor) -> Loaded:
        """Images of ``rows``, not augmented, without those of bad samples."""
        u = torch.zeros(len(rows), 0)
        if self.source.stack is not None:
            return self._take(rows, "none", u)
        return self.load(([row] for row in rows.tolist()), self.content, "none", u, replaced=False)

    def content(self, row: int) -> bytes:
        """The encoded image of one row.

        Raises:
            BadSample: it cannot be had.
        """
        return self.source.content(int(self.indices[row]))

    def load(
        self,
        candidates: Iterable[Iterable[int]],
        content: Callable[[int], bytes],
        kind: Augment,
        u: Tensor,
        replaced: bool = True,
    ) -> Loaded:
        """Decodes and augments an image for each row of a batch: that of the first good candidate.

        Args:
            candidates: rows of this subset, for each of B images.
            content: of a row.
            replaced: whether there are others for a bad sample; it is left out otherwise.
        """
        rows: list[int] = []
        images: list[Tensor] = []
        maps: list[Tensor] = []
        faults: list[Fault] = []
        for some, numbers in zip(candidates, u.tolist(), strict=True):
            tried = 0
            for row in itertools.islice(some, MAX_IN_A_ROW):
                tried += 1
                try:
                    encoded = content(row)
                    image = load(encoded, kind, numbers, self.size, len(self.mean))
                    if isinstance(self.source, SceneSource):
                        labels = _label_map(self.source, int(self.indices[row]), encoded)
                        maps.append(load_map(labels, kind, numbers, self.size))
                except BadSample as bad:
                    faults.append(Fault(self.source.keys[int(self.indices[row])], bad.kind, bad.reason))
                    continue
                images.append(image)
                rows.append(row)
                break
            else:
                if replaced:
                    last = faults[-1]
                    raise HopelessError(
                        f"{last.key}: {last.reason}, and {tried - 1} others tried with it are bad too; "
                        "check that this is the right data",
                        tuple(faults),
                    )
        indices = self.indices[torch.tensor(rows, dtype=torch.int64)]
        empty = torch.empty(0, len(self.mean), *self.size, dtype=torch.uint8)
        stacked = torch.stack(images) if images else empty
        known = self._labels_of(indices)
        if isinstance(self.source, SceneSource):
            known = augment_maps(kind, torch.stack(maps) if maps else empty[:, 0], u)
        return Loaded(augment(kind, stacked, u), indices, known, tuple(faults))

    def _take(self, rows: Tensor, kind: Augment, u: Tensor) -> Loaded:
        indices = self.indices[rows]
        assert self.source.stack is not None
        images = self.source.stack.index_select(0, indices)
        if kind == "resized-crop":
            pairs = zip(images, u.tolist(), strict=True)
            images = torch.stack([load(image, kind, row, self.size, len(self.mean)) for image, row in pairs])
        labels = self._labels_of(indices)
        if labels is not None and labels.ndim == 3:
            assert kind != "resized-crop", "maps that lie in memory have lost their own size"
            labels = augment_maps(kind, labels, u)
        return Loaded(augment(kind, fit(images, self.size), u), indices, labels)

    def _labels_of(self, indices: Tensor) -> Tensor | None:
        return None if self.source.labels is None else self.source.labels[indices]


def _label_map(source: SceneSource, index: int, encoded: bytes) -> Tensor:
    """uint8 [H, W], of the size of its image; whatever is wrong with it is a bad label.

    Raises:
        BadSample: it cannot be read, or has another size.
    """
    try:
        labels = source.label_map(index)
    except BadSample as bad:
        raise BadSample("label", f"its label map: {bad.reason}") from None
    (height, width), (rows, columns) = image_size(encoded), labels.shape
    if (height, width) != (rows, columns):
        raise BadSample("label", f"its label map has {columns} x {rows} pixels, the image {width} x {height}")
    return labels


def substitutes(row: int, length: int) -> Iterator[int]:
    """``row`` and then all others of ``length``, far from it first: what is tried where a sample is bad."""
    stride = stride_of(length)
    return ((row + step * stride) % length for step in range(length))


def first_good(
    candidates: Iterable[int], keys: Sequence[str], read: Callable[[int], Content], faults: list[Fault]
) -> tuple[int, Content]:
    """The first sample that can be read, and what was read.

    Args:
        candidates: indices into ``keys``.
        read: raises BadSample.
        faults: receives the bad ones before it.

    Raises:
        HopelessError: MAX_IN_A_ROW samples are bad.
    """
    for index in itertools.islice(candidates, MAX_IN_A_ROW):
        try:
            return index, read(index)
        except BadSample as bad:
            faults.append(Fault(keys[index], bad.kind, bad.reason))
    last = faults[-1]
    raise HopelessError(
        f"{last.key}: {last.reason}, and those tried before it are bad too; check that this is the right "
        "data",
        tuple(faults),
    )


@lru_cache(maxsize=64)
def stride_of(length: int) -> int:
    """A step that visits all of ``length`` positions, neighbours far from each other (the golden section)."""
    start = max(1, round(length * 0.618))
    return next(step for step in range(start, start + length) if math.gcd(step, length) == 1)
