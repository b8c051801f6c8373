"""What the hosts of all ranks agree on, beside the devices."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from mlomae.distributed.env import GRACE


class Agreement:
    """A process group of its own, of hosts: to agree on a flag waits for no device.

    Created on all ranks together.

    Args:
        patience: seconds after which the watchdog gives up waiting for a rank; this group waits longer.
    """

    def __init__(self, patience: float) -> None:
        limit = timedelta(seconds=patience + GRACE)
        several = dist.is_initialized() and dist.get_world_size() > 1
        self._group: Any = dist.new_group(backend="gloo", timeout=limit) if several else None

    def anywhere(self, flag: bool) -> bool:
        """Whether any rank's flag is set; called on all ranks together."""
        if self._group is None:
            return flag
        raised = torch.tensor([flag], dtype=torch.uint8)
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self._group)
        return bool(raised)
