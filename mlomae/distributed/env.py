"""Ranks and devices, from the environment that torchrun, the deepspeed launcher or srun set."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, TCPStore  # torch's __all__ omits them

from mlomae.errors import UserError

# Seconds by which a collective outlives the watchdog's patience: that one names the rank.
GRACE = 60.0
# Ports of runs under Slurm that name none: from here on, by job and step.
_FIRST_PORT, _NUM_PORTS = 20000, 10000
# A name that torch makes anew in every pass. While nobody holds it, each one leaves a dead place in CPython's
# table of names, which outgrows itself after some 28,000 outer iterations: 7 MiB.
_KEPT_NAME = "is_inplace_on_view"
# Parameters of glibc's mallopt, from malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


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


def join_world(device: str, always_group: bool = False, patience: float = 1800.0) -> World:
    """Reads the launcher's variables and joins the process group; one process needs neither.

    Args:
        device: auto, cpu or cuda.
        always_group: a process on its own joins a group too (DeepSpeed needs one).
        patience: seconds after which somebody else gives up waiting for a rank; collectives wait longer.

    Raises:
        UserError: cuda is asked for and absent, or the launcher's variables are wrong or incomplete.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("device: cuda asked for, but torch sees no GPU; use auto or cpu")
    under_slurm = _adopt_slurm_step()
    rank, size, local_rank = _integer("RANK", 0), _integer("WORLD_SIZE", 1), _integer("LOCAL_RANK", 0)
    if rank >= size:
        raise UserError(f"environment variable RANK: found {rank}, expected less than WORLD_SIZE ({size})")
    target = torch.device("cpu")
    if available and device != "cpu":
        count = torch.cuda.device_count()
        if under_slurm and count == 1:
            # Slurm has bound a GPU to each task, which sees no other.
            os.environ["LOCAL_RANK"], local_rank = "0", 0
        if local_rank >= count:
            raise UserError(
                f"environment variable LOCAL_RANK: found {local_rank}, but there are {count} GPUs here; "
                "start as many processes as GPUs, or use --device cpu"
            )
        target = torch.device("cuda", local_rank)
        torch.cuda.set_device(target)
    if target.type == "cpu":
        _keep_freed_memory()
    if (size > 1 or always_group) and not dist.is_initialized():
        _join_group("nccl" if target.type == "cuda" else "gloo", rank, size, patience + GRACE)
    return World(rank, size, target)


def _adopt_slurm_step() -> bool:
    """Where srun started this process and no other launcher did: srun's variables under torch's names.

    The batch script itself is no task of a step, and has no step's number of tasks.
    """
    if "RANK" in os.environ or "SLURM_STEP_NUM_TASKS" not in os.environ:
        return False
    size = _integer("SLURM_STEP_NUM_TASKS", 1)
    variables = {
        "RANK": str(_integer("SLURM_PROCID", 0)),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(_integer("SLURM_LOCALID", 0)),
    }
    if size > 1:
        offset = 101 * _integer("SLURM_JOB_ID", 0) + _integer("SLURM_STEP_ID", 0)
        os.environ.setdefault("MASTER_ADDR", first_host(os.environ.get("SLURM_STEP_NODELIST", "")))
        os.environ.setdefault("MASTER_PORT", str(_FIRST_PORT + offset % _NUM_PORTS))
    os.environ.update(variables)
    return True


def first_host(nodes: str) -> str:
    """The first host of Slurm's compact list: ``gpu[03-05,9]-a,login1`` → ``gpu03-a``.

    Raises:
        UserError: there is none.
    """
    found = re.match(r"([^,\[]*)(?:\[([^],-]+)[^]]*\]([^,]*))?", nodes)
    host = "".join(part for part in found.groups() if part) if found else ""
    if not host:
        raise UserError(
            f"environment variable SLURM_STEP_NODELIST: found {nodes!r}, expected a list of nodes"
        )
    return host


def _keep_freed_memory() -> None:
    """Lets glibc reuse the memory of large tensors instead of returning it to the system.

    By default blocks above 32 MiB are mapped afresh at every allocation, and the kernel fills them with zeros
    page by page: 8 % of an outer iteration of ViT-B. What a user sets in the environment stays.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ:
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)


def _join_group(backend: str, rank: int, size: int, timeout: float) -> None:
    if size == 1:
        # Nobody to meet: no port, and no launcher whose variables DeepSpeed insists on.
        os.environ.setdefault("LOCAL_RANK", "0")
        store = HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
        return
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise UserError(
            f"environment variable {missing[0]}: missing with WORLD_SIZE={size}; "
            "start with torchrun, deepspeed or srun"
        )
    limit = timedelta(seconds=timeout)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        # torchrun's store outlives a restart, and with it the addresses of ranks that are gone.
        address, port = os.environ["MASTER_ADDR"], _integer("MASTER_PORT", 0)
        agent = TCPStore(address, port, is_master=False, timeout=limit)
        attempt = PrefixStore(f"attempt-{_integer('TORCHELASTIC_RESTART_COUNT', 0)}", agent)
        dist.init_process_group(backend, store=attempt, rank=rank, world_size=size, timeout=limit)
    else:
        dist.init_process_group(backend, timeout=limit)


def was_requeued() -> bool:
    """Whether this is a later attempt of a Slurm job."""
    return _integer("SLURM_RESTART_COUNT", 0) > 0


def leave_world() -> None:
    """Leaves the process group, if one was joined."""
    if dist.is_initialized():
        # DeepSpeed, where it is in use, has to forget the group too, or the next run finds a dead one.
        comm: Any = sys.modules.get("deepspeed.comm")
        (comm if comm and comm.is_initialized() else dist).destroy_process_group()


def _integer(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UserError(f"environment variable {name}: found {text!r}, expected a whole number")
    return int(text)
