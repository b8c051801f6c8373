"""Sets that lie on the device as bytes: decoded once, augmented there, no loader processes."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from mlomae.data.batches import Subset
from mlomae.data.sources import TensorSource
from mlomae.data.transforms import NUM_UNIFORMS, Augment

# What "auto" takes of a device's memory for one set: CIFAR needs 150 MB.
MAX_BYTES = 2**30
_CHUNK = 256  # images decoded by one thread at a time


def can_be_resident(kind: Augment) -> bool:
    """Whether the augmentation begins with images of one size; ``resized-crop`` needs the originals."""
    return kind != "resized-crop"


def is_worthwhile(subset: Subset, channels: int, images_to_read: int) -> bool:
    """What ``data.resident: auto`` decides.

    Args:
        channels: of an image.
        images_to_read: by the whole run.
    """
    num_bytes = len(subset) * channels * subset.size[0] * subset.size[1]
    # Decoding a set costs one epoch, which pays from the second one on.
    decoded = subset.source.stack is not None
    return num_bytes <= MAX_BYTES and (decoded or images_to_read >= 2 * len(subset))


def make_resident(subset: Subset, device: torch.device) -> Subset:
    """The same set with its images on the device.

    Decoding takes as long as one epoch's reading, shared by as many threads as there are processors.

    Raises:
        UserError: an image cannot be read.
    """
    rows = torch.arange(len(subset)).split(_CHUNK)

    def read(chunk: Tensor) -> Tensor:
        return subset.read(chunk, "none", torch.zeros(len(chunk), NUM_UNIFORMS))[0]

    if subset.source.stack is not None:
        parts = [read(chunk) for chunk in rows]
    else:
        # Decoders release the interpreter lock.
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            parts = list(pool.map(read, rows))
    labels = subset.source.labels
    source = TensorSource(
        [subset.source.keys[index] for index in subset.indices.tolist()],
        torch.cat(parts).to(device),
        None if labels is None else labels[subset.indices].to(device),
    )
    return replace(subset, source=source, indices=torch.arange(len(subset), device=device), resident=True)
