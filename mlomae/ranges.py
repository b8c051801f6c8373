"""Named ranges of an outer iteration, which say where a run is and which torch's profiler records."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function

PREFIX = "mlomae/"
"""Of the names of all ranges in a trace."""
_NOTHING = nullcontext()


class Position:
    """Where this process is in its run. One thread writes, others may read.

    Attributes:
        iteration: outer iteration, from 0; -1 before the first one.
        number: of the ranges entered since the iteration began.
        part: name of the range entered last; it stays when the range ends.
    """

    __slots__ = ("iteration", "number", "part")

    def __init__(self) -> None:
        self.iteration, self.number, self.part = -1, 0, "start"

    def begin(self, iteration: int) -> None:
        """An outer iteration begins."""
        self.iteration, self.number = iteration, 0


position = Position()


def profiled(name: str) -> AbstractContextManager[Any, None]:
    """A range of this name, within which the time counts as that part of the outer iteration.

    Costs 0.4 us where no profiler is on, against 6 us of a bare ``record_function``. Belongs outside compiled
    modules. Ranks that wait for each other should enter the same ranges in the same order: the one that has
    entered the fewest counts as the one that the others wait for.

    Args:
        name: without the prefix, such as ``pretrain/forward``; see ``mlomae.profile_trace.PARTS``.
    """
    position.part = name
    position.number += 1
    return record_function(PREFIX + name) if torch._C._autograd._profiler_enabled() else _NOTHING
