"""Ranks and devices, from the environment that torchrun and the deepspeed launcher set."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from mlomae.errors import UserError

# Collectives that take longer mean that a rank is gone; the default of 30 minutes hides it.
TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class World:
    """This process among its peers."""

    rank: int
    size: int
    device: torch.device

    @property
    def primary(self) -> bool:
        """Rank 0: the one that writes and prints."""
        return self.rank == 0

    def share_of(self, batch_size: int, field: str) -> int:
        """This rank's share of a global batch.

        Raises:
            UserError: the batch does not divide evenly.
        """
        if batch_size % self.size:
            raise UserError(f"{field}: {batch_size} is not divisible by the {self.size} ranks of this run")
        return batch_size // self.size


def join_world(device: str) -> World:
    """Reads the launcher's variables and joins the process group; one process needs neither.

    Args:
        device: auto, cpu or cuda.

    Raises:
        UserError: cuda is asked for and absent, or the launcher's variables are incomplete.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("device: cuda asked for, but torch sees no GPU; use auto or cpu")
    kind = "cuda" if available and device != "cpu" else "cpu"
    rank, size, local_rank = (_integer(name, default) for name, default in
                              (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))  # fmt: skip
    if kind == "cuda":
        torch.cuda.set_device(local_rank)
    target = torch.device(kind, local_rank) if kind == "cuda" else torch.device("cpu")
    if size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=TIMEOUT)
    return World(rank, size, target)


def leave_world() -> None:
    """Leaves the process group, if one was joined."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdigit():
        raise UserError(f"environment variable {name}: found {text!r}, expected a whole number")
    return int(text)
