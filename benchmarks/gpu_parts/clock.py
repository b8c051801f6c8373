"""Time on a device: by its own events on a GPU, which cost the host nothing."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

Mark = Any
"""A point in time."""
COPY_BYTES = 2**30


class Clock:
    """Marks points in the work that a device is given.

    Args:
        device: a CPU's marks are the host's time; for smoke runs.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"

    def mark(self) -> Mark:
        """The point that the device has reached when all work so far is done."""
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Until the device has nothing left to do."""
        if self._on_gpu:
            torch.cuda.synchronize()

    def between(self, first: Mark, last: Mark) -> float:
        """Milliseconds; the device has to have passed both."""
        if not self._on_gpu:
            return 1e3 * (last - first)
        elapsed: float = first.elapsed_time(last)
        return elapsed


def milliseconds(run: Callable[[], object], device: torch.device, repeat: float = 60) -> float:
    """Median time of a short function, the L2 cache emptied before each run; one run on a CPU.

    Args:
        repeat: milliseconds to spend.
    """
    if device.type != "cuda":
        started = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - started)
    from triton.testing import do_bench

    median = do_bench(run, warmup=15, rep=repeat, return_mode="median")
    return float(median)


def copy_bandwidth(device: torch.device, num_bytes: int = COPY_BYTES) -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.empty(num_bytes if device.type == "cuda" else 2**20, dtype=torch.uint8, device=device)
    source.random_()
    target = torch.empty_like(source)
    return 2 * source.numel() / (1e-3 * milliseconds(lambda: target.copy_(source), device))


def peak_gib(device: torch.device) -> float | None:
    """Highest memory of tensors since ``forget_peak``; None on a CPU."""
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None


def forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
