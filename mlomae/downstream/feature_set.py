"""Features of images with their labels, and how they come together from all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlomae.data.batches import Batch
from mlomae.data.loader import Part
from mlomae.distributed import collectives
from mlomae.distributed.env import World
from mlomae.ranges import position

Encode = Callable[[Tensor], Tensor]
"""Images [B, C, H, W] on the world's device → features [B, F]."""
PARTS: tuple[Part, ...] = ("labelled", "heldout", "test")
_ROWS = 2**14  # features that are moved at once


@dataclass(frozen=True)
class FeatureSet:
    """Features and labels of one part, on one device.

    Attributes:
        features: float32 [N, F].
        labels: int64 [N].
    """

    features: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: slice) -> FeatureSet:
        """Some of the images; shares the memory."""
        return FeatureSet(self.features[rows], self.labels[rows])


def join(
    sets: Sequence[FeatureSet], device: torch.device, change: Callable[[Tensor], Tensor] | None = None
) -> FeatureSet:
    """All images of some sets on a device, one set after the other, in memory of their own.

    Args:
        change: applied to features [B, F] on the way, on the device.
    """
    total, width = sum(map(len, sets)), sets[0].features.shape[1]
    joined = FeatureSet(
        torch.empty(total, width, device=device), torch.cat([part.labels for part in sets]).to(device)
    )
    start = 0
    for part in sets:
        for rows in part.features.split(_ROWS):
            moved = rows.to(device)
            joined.features[start : start + len(rows)] = moved if change is None else change(moved)
            start += len(rows)
    return joined


@torch.no_grad()
def gather_features(
    encode: Encode, rounds: Iterable[Batch | None], capacity: int, world: World
) -> FeatureSet | None:
    """Features on rank 0, in the order of the images; None elsewhere. Called on every rank.

    Args:
        rounds: this rank's batches, as many as on every rank; in each round the ranks' batches follow each
            other. None is for a rank that has none.
        capacity: images that may come; the features are written where they stay.
    """
    features, labels, end = torch.empty(0), torch.empty(0, dtype=torch.int64), 0
    for batch in rounds:
        position.number += 1
        own = None
        if batch is not None:
            assert batch.labels is not None
            own = encode(batch.images.to(world.device)).float().cpu().numpy(), batch.labels.cpu().numpy()
        for row in collectives.gather_object(own) or ():
            if row is None:
                continue
            if not end:
                features = torch.empty(capacity, row[0].shape[1])
                labels = torch.empty(capacity, dtype=torch.int64)
            start, end = end, end + len(row[1])
            features[start:end], labels[start:end] = map(torch.from_numpy, row)
    return FeatureSet(features[:end], labels[:end]) if world.primary else None
