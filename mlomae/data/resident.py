"""Sets that lie on the device as bytes: decoded once, augmented there, no loader processes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from mlomae.data.dataset import TensorSource
from mlomae.data.faults import Fault
from mlomae.data.shards.source import ShardSource
from mlomae.data.subset import Loaded, Subset
from mlomae.data.transforms import Augment
from mlomae.ranges import position

# What "auto" takes of a device's memory for one set: CIFAR needs 150 MB.
MAX_BYTES = 2**30
_CHUNK = 256  # images decoded by one thread at a time


def can_be_resident(kind: Augment) -> bool:
    """Whether the augmentation begins with images of one size; ``resized-crop`` needs the originals."""
    return kind != "resized-crop"


def is_worthwhile(subset: Subset, bytes_per_pixel: int, images_to_read: int) -> bool:
    """What ``data.resident: auto`` decides.

    Args:
        bytes_per_pixel: of an image, with its label where it has one.
        images_to_read: by the whole run.
    """
    num_bytes = len(subset) * bytes_per_pixel * subset.size[0] * subset.size[1]
    # Decoding a set costs one epoch, which pays from the second one on.
    decoded = subset.source.stack is not None
    return num_bytes <= MAX_BYTES and (decoded or images_to_read >= 2 * len(subset))


def make_resident(subset: Subset, device: torch.device) -> tuple[Subset, list[Fault]]:
    """The same set with its images on the device.

    Decoding takes as long as one epoch's reading, shared by as many threads as there are processors. In place
    of a bad sample stands the same good one as where batches are read one by one.

    Returns:
        The set, and the bad samples.

    Raises:
        UserError: the set cannot be read.
    """
    chunks = torch.arange(len(subset)).split(_CHUNK)

    def read(rows: Tensor) -> Loaded:
        position.number += 1  # many threads: an estimate will do to see that it goes on
        return subset.read(rows, "none", torch.zeros(len(rows), 0))

    if subset.source.stack is not None:
        parts = [read(rows) for rows in chunks]
    else:
        # Decoders release the interpreter lock. What comes front to back has to be asked for in that order.
        threads = 1 if isinstance(subset.source, ShardSource) and subset.source.remote else os.cpu_count()
        with ThreadPoolExecutor(threads) as pool:
            parts = list(pool.map(read, chunks))
    labels = [part.labels for part in parts if part.labels is not None]
    keys = subset.source.keys
    source = TensorSource(
        [keys[index] for index in subset.indices.tolist()],
        torch.cat([part.images for part in parts]).to(device),
        torch.cat(labels).to(device) if labels else None,
    )
    placed = replace(subset, source=source, indices=torch.arange(len(subset), device=device), resident=True)
    return placed, [fault for part in parts for fault in part.faults]
