"""Whole tensors and the flat shards that ranks hold of them.

A shard is a flat tensor of one rank. It consists of pieces: of every piece, the ranks hold equal parts, and
all parts in rank order are one flat tensor, in which the parameters lie. ZeRO 1 and 2 cut a parameter group
(one piece, many parameters), ZeRO 3 cuts every parameter (one piece each).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from mlomae.distributed import collectives

BYTES_PER_GATHER = 64 << 20
"""What rank 0 receives at once, from all ranks together."""


@dataclass(frozen=True)
class Member:
    """A parameter in a flat tensor: its name, its first element's place there, and its shape."""

    name: str
    offset: int
    shape: torch.Size

    def of(self, flat: Tensor) -> Tensor:
        """Its view of the flat tensor."""
        return flat[self.offset : self.offset + self.shape.numel()].view(self.shape)


@dataclass(frozen=True)
class Piece:
    """A stretch of every rank's shard.

    Attributes:
        size: numbers that each rank holds.
        members: parameters of the flat tensor of ``ranks * size`` numbers; the rest is padding.
    """

    size: int
    members: Sequence[Member]


def gather_shard(shard: Tensor, pieces: Sequence[Piece], device: torch.device) -> dict[str, Tensor]:
    """The whole tensors by name in host memory of rank 0, {} elsewhere; called on all ranks together.

    Args:
        shard: this rank's, wherever it lies.
        pieces: all of it, in order.
        device: from which the ranks can send.
    """
    ranks = collectives.num_ranks()
    wholes = [host_empty(ranks * p.size, shard, device) for p in pieces] if collectives.is_primary() else []
    step = max(1, BYTES_PER_GATHER // (ranks * shard.element_size()))
    for start in range(0, shard.numel(), step):
        part = shard.detach()[start : start + step]
        for rank, received in enumerate(_gather(part, device)):
            for whole, target, source in _overlaps(wholes, pieces, start, received.numel()):
                size = whole.numel() // ranks
                where = slice(rank * size + target.start, rank * size + target.stop)
                whole[where].copy_(received[source], non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {
        member.name: member.of(whole)
        for whole, piece in zip(wholes, pieces, strict=False)
        for member in piece.members
    }


def fill_shard(shard: Tensor, pieces: Sequence[Piece], state: Mapping[str, Tensor], prefix: str) -> None:
    """Copies this rank's parts of the tensors ``<prefix><name>`` into its shard; padding is 0."""
    rank, start = collectives.rank(), 0
    for piece in pieces:
        own = shard.detach()[start : start + piece.size].zero_()
        first, start = rank * piece.size, start + piece.size
        for member in piece.members:
            low = max(first, member.offset)
            high = min(first + piece.size, member.offset + member.shape.numel())
            if low < high:
                value = state[prefix + member.name].flatten()
                own[low - first : high - first].copy_(value[low - member.offset : high - member.offset])


def host_empty(count: int, like: Tensor, device: torch.device) -> Tensor:
    """Memory of the host to copy into; from a GPU, of torch's cache of pinned memory."""
    return torch.empty(count, dtype=like.dtype, pin_memory=device.type == "cuda")


def host_copies(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copies in host memory on rank 0, {} elsewhere."""
    if not collectives.is_primary():
        return {}
    copies = {}
    for name, tensor in tensors.items():
        copies[name] = host_empty(math.prod(tensor.shape), tensor, device).view(tensor.shape)
        copies[name].copy_(tensor.detach(), non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return copies


def _gather(part: Tensor, device: torch.device) -> list[Tensor]:
    """Every rank's part in rank order on rank 0, nothing elsewhere."""
    if collectives.num_ranks() == 1:
        return [part]
    part = part.to(device).contiguous()
    primary = collectives.is_primary()
    received = [torch.empty_like(part) for _ in range(collectives.num_ranks())] if primary else None
    dist.gather(part, received)
    return received or []


def _overlaps(
    wholes: Sequence[Tensor], pieces: Sequence[Piece], start: int, count: int
) -> Iterator[tuple[Tensor, slice, slice]]:
    """Where ``count`` numbers of a shard from ``start`` on lie in pieces, and in themselves."""
    offset = 0
    for whole, piece in zip(wholes, pieces, strict=True):
        low, high = max(start, offset), min(start + count, offset + piece.size)
        if low < high:
            yield whole, slice(low - offset, high - offset), slice(low - start, high - start)
        offset += piece.size
