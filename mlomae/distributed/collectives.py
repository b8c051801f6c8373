"""The few collectives that training needs; all are the identity for one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from mlomae.errors import UserError

T = TypeVar("T")


def _active() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def is_primary() -> bool:
    """Whether this is rank 0."""
    return not _active() or dist.get_rank() == 0


def rank() -> int:
    """This rank, 0 for one alone."""
    return dist.get_rank() if _active() else 0


def num_ranks() -> int:
    """How many there are."""
    return dist.get_world_size() if _active() else 1


def average(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The mean over ranks of each tensor, in place where the tensor allows it.

    Every rank receives the same bits.
    """
    if not _active():
        return list(tensors)
    dense = [tensor.contiguous() for tensor in tensors]
    pending = [dist.all_reduce(tensor, async_op=True) for tensor in dense]
    for work in pending:
        work.wait()
    torch._foreach_div_(dense, float(dist.get_world_size()))
    return dense


def total(tensor: Tensor) -> Tensor:
    """Sum over ranks; every rank receives the same bits."""
    if _active():
        dist.all_reduce(tensor)
    return tensor


def maximum(tensor: Tensor) -> Tensor:
    """Element-wise maximum over ranks."""
    if _active():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def gather_object(value: T) -> list[T] | None:
    """Every rank's value in rank order on rank 0, None elsewhere."""
    if not _active():
        return [value]
    primary = dist.get_rank() == 0
    values: list[T] | None = [value] * dist.get_world_size() if primary else None
    dist.gather_object(value, values)
    return values


def broadcast_object(value: T) -> T:
    """Rank 0's value, on every rank."""
    if not _active():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def on_primary(action: Callable[[], object]) -> None:
    """Runs ``action`` on rank 0 while the others wait.

    Raises:
        UserError: on every rank, if rank 0 met one or could not write a file.
    """
    problem = ""
    if is_primary():
        try:
            action()
        except UserError as error:
            problem = str(error)
        except OSError as error:
            problem = f"{error.filename or 'run_dir'}: cannot be written ({error.strerror or error})"
    problem = broadcast_object(problem)
    if problem:
        raise UserError(problem)
