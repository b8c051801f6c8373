"""The largest batch that fits."""

from __future__ import annotations

from dataclasses import dataclass, replace

from mlomae.config import Config
from mlomae.planning.memory import Memory

# Far above what any GPU holds: ends the search where a batch costs next to nothing.
LARGEST = 1 << 16


@dataclass(frozen=True)
class Fit:
    """The largest batch of a way to run.

    Attributes:
        checkpointing: of activations.
        micro_batches: of a pretrain step; the direction takes its batches whole in any case.
        images: per rank and level; 0 where not even one fits.
    """

    checkpointing: bool
    micro_batches: int
    images: int


def largest_batches(memory: Memory, limit: int) -> list[Fit]:
    """For activations kept and recomputed, for the configured micro-batches and four times as many.

    All levels get the same batch, which is a multiple of the micro-batches on every rank.

    Args:
        limit: bytes of a GPU.
    """
    parts = memory.config.pretrain.micro_batches
    return [
        Fit(checkpointing, count, largest_batch(memory, limit, checkpointing, count))
        for checkpointing in (False, True)
        for count in (parts, 4 * parts)
    ]


def largest_batch(memory: Memory, limit: int, checkpointing: bool, micro_batches: int) -> int:
    """Images per rank; 0 where not even ``micro_batches`` fit."""

    def fits(multiple: int) -> bool:
        images = multiple * micro_batches * memory.sharding.ranks
        tried = replace(memory, config=with_batch(memory.config, images, checkpointing, micro_batches))
        worst = tried.worst()
        return worst.total + tried.runtime(worst) <= limit

    low, high = 0, LARGEST // micro_batches
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low * micro_batches


def with_batch(config: Config, images: int, checkpointing: bool, micro_batches: int) -> Config:
    """The run with another global batch at all levels."""
    pretrain = {"batch_size": images, "micro_batches": micro_batches}
    return config.model_copy(
        update={
            "pretrain": config.pretrain.model_copy(update=pretrain),
            "head": config.head.model_copy(update={"batch_size": images}),
            "mask": config.mask.model_copy(update={"batch_size": images}),
            "compute": config.compute.model_copy(update={"activation_checkpointing": checkpointing}),
        }
    )
