"""Processors and GPUs: what they are, and whether torch uses them as it should."""

from __future__ import annotations

import os
from pathlib import Path

from mlomae.doctor.checks import Check, Finding, absent, ok, problem

GROUP = "devices"
GIB = 2**30
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def device_checks() -> list[Check]:
    return [
        Check(GROUP, "processor", _processor, "set OMP_NUM_THREADS to the number of processors"),
        Check(GROUP, "bf16 on the processor", _cpu_bf16, "use --compute.precision float32"),
        Check(GROUP, "GPUs", _gpus, "see nvidia-smi; CUDA_VISIBLE_DEVICES may hide or misname GPUs"),
    ]


def has_gpu() -> bool:
    """Whether torch is there and sees a GPU."""
    try:
        import torch
    except ImportError:
        return False
    return torch.cuda.is_available()


def usable_processors() -> int:
    """Processors that this process may use: its affinity, and the share of its container."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = _QUOTA.read_text().split()
        return min(count, max(1, round(int(quota) / int(period))))
    except (OSError, ValueError):  # ValueError: "max", no limit
        return count


def _processor() -> Finding:
    import torch

    from mlomae.environment import cpu_name

    count, threads = usable_processors(), torch.get_num_threads()
    text = f"{cpu_name()}, {count} usable, {threads} threads of torch's"
    if threads > count:
        return problem(f"{text}: they wait for each other", f"set OMP_NUM_THREADS={count}")
    return ok(text)


def _cpu_bf16() -> Finding:
    from mlomae.precision import cpu_has_bf16

    return ok("in hardware") if cpu_has_bf16() else absent("not in hardware: slower than float32")


def _gpus() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return absent("none that torch sees")
    names = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        with torch.cuda.device(number):
            bf16 = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no bf16"
            torch.ones(1, device="cuda").add_(1).item()
        capability = f"compute capability {properties.major}.{properties.minor}"
        names.append(f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, {capability}, {bf16}")
    return ok("; ".join(f"{number}: {name}" for number, name in enumerate(names)))
