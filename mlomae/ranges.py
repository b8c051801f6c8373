"""Named ranges of an outer iteration, which torch's profiler records (``mlomae profile``)."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.profiler import record_function

PREFIX = "mlomae/"
"""Of the names of all ranges in a trace."""
_NOTHING = nullcontext()


def profiled(name: str) -> AbstractContextManager[Any, None]:
    """A range of this name, within which the time counts as that part of the outer iteration.

    Costs 0.3 us where no profiler is on, against 6 us of a bare ``record_function``. Belongs outside compiled
    modules.

    Args:
        name: without the prefix, such as ``pretrain/forward``; see ``mlomae.profile_trace.PARTS``.
    """
    return record_function(PREFIX + name) if torch._C._autograd._profiler_enabled() else _NOTHING
