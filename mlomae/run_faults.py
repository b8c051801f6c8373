"""Ends that its surroundings cause a run or an evaluation, each told in one line: memory, loaders, disks."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mlomae.errors import UserError
from mlomae.ranges import position

# By the beginning of the range in which memory ran out: what needs less of it.
_LESS_MEMORY = {
    "pretrain": "raise pretrain.micro_batches or set compute.activation_checkpointing",
    "direction": "lower head.batch_size and mask.batch_size",
    "head": "lower head.batch_size",
    "influence": "lower hypergradient.share",
    "mask": "lower hypergradient.share",
    "evaluate": "lower eval.batch_size",
}
_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}
_BROKEN = {errno.EIO, errno.ESTALE}
_GOES_ON = "the same command goes on from the last checkpoint"


def _in_iteration() -> tuple[str, str]:
    less = _LESS_MEMORY.get(position.part.partition("/")[0], "see `mlomae plan`")
    return f"in {position.part} of iteration {position.iteration}", less


@contextmanager
def told_in_one_line(
    folder: Path, busy_with: Callable[[], tuple[str, str]] = _in_iteration
) -> Iterator[None]:
    """Within the context such an end is a ``UserError``; every other error stays as it is.

    Args:
        folder: that is written to.
        busy_with: where the work is, and what needs less memory there; by default, of a training.
    """
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise _out_of_memory(*busy_with()) from None
    except RuntimeError as error:
        text = str(error)
        if "can't allocate memory" in text:  # of torch's allocator on the CPU
            raise _out_of_memory(*busy_with()) from None
        if text.startswith("DataLoader worker"):
            raise UserError(
                f"data.workers: a loader process ended without a word {busy_with()[0]}, "
                f"perhaps for want of memory; set fewer if it happens again; {_GOES_ON}"
            ) from None
        raise
    except OSError as error:
        if error.errno not in _UNWRITABLE | _BROKEN:
            raise
        cannot = "written" if error.errno in _UNWRITABLE else "read or written"
        raise UserError(
            f"{error.filename or folder}: cannot be {cannot} ({error.strerror}); {_GOES_ON}"
        ) from None


def _out_of_memory(where: str, less: str) -> UserError:
    return UserError(f"out of memory {where}: {less}; {_GOES_ON}")
