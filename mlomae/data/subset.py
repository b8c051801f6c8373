"""Some images of a source, read and augmented by row; bad samples are replaced by their neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlomae.data.dataset import Source
from mlomae.data.faults import BadSample, Fault
from mlomae.data.transforms import Augment, augment, fit, load
from mlomae.errors import UserError

# Bad samples in a row after which nothing good is expected any more.
MAX_IN_A_ROW = 100


@dataclass(frozen=True)
class Loaded:
    """Augmented images and where they come from."""

    images: Tensor  # uint8 [B, C, H, W]
    indices: Tensor  # int64 [B], into the source
    labels: Tensor | None  # int64 [B]
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

    def read(self, rows: Tensor, kind: Augment, u: Tensor) -> Loaded:
        """Images of ``rows`` [B]; in place of a bad sample stands the next good one.

        Args:
            u: float32 [B, NUM_UNIFORMS].

        Raises:
            UserError: MAX_IN_A_ROW samples are bad.
        """
        if self.source.stack is not None:
            return self._take(rows, kind, u)
        return self.load(range(len(self)), rows.tolist(), self.content, kind, u)

    def read_good(self, rows: Tensor) -> Loaded:
        """Images of ``rows``, not augmented, without those of bad samples."""
        u = torch.zeros(len(rows), 0)
        if self.source.stack is not None:
            return self._take(rows, "none", u)
        return self.load(range(len(self)), rows.tolist(), self.content, "none", u, replaced=False)

    def content(self, row: int) -> bytes:
        """The encoded image of one row.

        Raises:
            BadSample: it cannot be had.
        """
        return self.source.content(int(self.indices[row]))

    def load(
        self,
        ring: Sequence[int],
        starts: Sequence[int],
        content: Callable[[int], bytes],
        kind: Augment,
        u: Tensor,
        replaced: bool = True,
    ) -> Loaded:
        """Decodes and augments the rows ``ring[start]``; after a bad one the next of the ring has its turn.

        Args:
            ring: rows of this subset.
            starts: B positions in the ring.
            content: of a row.
            replaced: whether bad samples are; they are left out otherwise.
        """
        rows: list[int] = []
        images: list[Tensor] = []
        faults: list[Fault] = []
        for start, numbers in zip(starts, u.tolist(), strict=True):
            tried = min(MAX_IN_A_ROW, len(ring)) if replaced else 1
            for step in range(tried):
                row = ring[(start + step) % len(ring)]
                try:
                    images.append(load(content(row), kind, numbers, self.size, len(self.mean)))
                except BadSample as bad:
                    key = self.source.keys[int(self.indices[row])]
                    faults.append(Fault(key, bad.kind, bad.reason))
                    continue
                rows.append(row)
                break
            else:
                if replaced:
                    last = faults[-1]
                    raise UserError(
                        f"{last.key}: {last.reason}, and so are the {tried - 1} samples before it; "
                        "is this the right data?"
                    )
        indices = self.indices[torch.tensor(rows, dtype=torch.int64)]
        stacked = (
            torch.stack(images) if images else torch.empty(0, len(self.mean), *self.size, dtype=torch.uint8)
        )
        return Loaded(augment(kind, stacked, u), indices, self._labels_of(indices), tuple(faults))

    def _take(self, rows: Tensor, kind: Augment, u: Tensor) -> Loaded:
        indices = self.indices[rows]
        assert self.source.stack is not None
        images = self.source.stack.index_select(0, indices)
        if kind == "resized-crop":
            pairs = zip(images, u.tolist(), strict=True)
            images = torch.stack([load(image, kind, row, self.size, len(self.mean)) for image, row in pairs])
        return Loaded(augment(kind, fit(images, self.size), u), indices, self._labels_of(indices))

    def _labels_of(self, indices: Tensor) -> Tensor | None:
        return None if self.source.labels is None else self.source.labels[indices]
