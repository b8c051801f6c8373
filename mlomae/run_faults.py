"""Ends of a run that its surroundings cause, each told in one line: memory, loader processes, disks."""

from __future__ import annotations

import errno
from collections.abc import Iterator
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
_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE}
_GOES_ON = "the same command goes on from the last checkpoint"


@contextmanager
def told_in_one_line(run_dir: Path) -> Iterator[None]:
    """Within the context such an end is a ``UserError``; every other error stays as it is."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError):
        raise _out_of_memory() from None
    except RuntimeError as error:
        text = str(error)
        if "can't allocate memory" in text:  # of torch's allocator on the CPU
            raise _out_of_memory() from None
        if text.startswith("DataLoader worker"):
            raise UserError(
                f"data.workers: a loader process ended without a word in iteration {position.iteration}, "
                f"perhaps for want of memory; set fewer if it happens again; {_GOES_ON}"
            ) from None
        raise
    except OSError as error:
        if error.errno not in _DISK:
            raise
        raise UserError(
            f"{error.filename or run_dir}: cannot be written ({error.strerror}); {_GOES_ON}"
        ) from None


def _out_of_memory() -> UserError:
    less = _LESS_MEMORY.get(position.part.partition("/")[0], "see `mlomae plan`")
    where = f"in {position.part} of iteration {position.iteration}"
    return UserError(f"out of memory {where}: {less}; {_GOES_ON}")
