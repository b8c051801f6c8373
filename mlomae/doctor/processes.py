"""Whether processes of this machine can add their numbers: gloo, and NCCL where there are GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from mlomae.doctor.checks import Check, Finding, absent, ok, problem
from mlomae.doctor.devices import has_gpu

GROUP = "processes"
SECONDS = 30.0  # until processes are given up: loading torch from a slow disk takes most of it
_PROGRAM = Path(__file__).with_name("all_reduce.py")


def process_checks() -> list[Check]:
    interface = "set GLOO_SOCKET_IFNAME to an interface of this machine, such as lo"
    nccl = "set NCCL_DEBUG=INFO and look at the first warning of a run"
    return [
        Check(GROUP, "gloo", partial(all_reduce, "gloo", 2, SECONDS), interface),
        Check(GROUP, "NCCL", _nccl, nccl),
    ]


def all_reduce(backend: str, size: int, seconds: float) -> Finding:
    """A sum over ``size`` processes that are started for it and have ``seconds``."""
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        words = [sys.executable, "-P", str(_PROGRAM), backend, str(store)]
        processes = [
            subprocess.Popen(
                [*words, str(rank), str(size), str(seconds)],
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            )
            for rank in range(size)
        ]  # fmt: skip
        try:
            for process in processes:
                left = max(0.0, start + seconds - time.monotonic())
                said = process.communicate(timeout=left)[1].strip().splitlines()
                if process.returncode:
                    return problem(said[-1] if said else f"a process ended with {process.returncode}")
        except subprocess.TimeoutExpired:
            return problem(f"no sum of {size} processes after {seconds:.0f} s")
        finally:
            for process in processes:
                process.kill()
                process.communicate()
    return ok(f"{size} processes added their numbers, {time.monotonic() - start:.1f} s with their start")


def _nccl() -> Finding:
    if not has_gpu():
        return absent("no GPU")
    import torch

    return all_reduce("nccl", min(2, torch.cuda.device_count()), SECONDS)
