"""Where a step's time on the device goes, by kernel and by kind, and which lines make the host wait."""

from __future__ import annotations

import gzip
import json
import re
import tempfile
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from benchmarks.gpu_parts.job import Job

ROOT = Path(__file__).resolve().parents[2]
MAX_TRACE_BYTES = 16 * 2**20
TOP = 25
_STEPS = 2
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
# The first that matches; names of kernels carry the names of libraries that others are built with.
_KINDS = (
    ("patch operators", r"_patch_gather|_patch_scatter|masked_patch_loss|select_patches"),
    ("attention", r"flash|fmha|sdpa|attention"),
    ("products", r"gemm|gemv|nvjet|cutlass|xmma|cublas|splitk|wgrad|dgrad|implicit|conv|triton_tem"),
    ("optimizer", r"multi_tensor|adam|foreach"),
    ("copies", r"memcpy|memset|catarray|direct_copy|fillfunctor"),
    (
        "normalisation, GELU, elementwise",
        r"triton_|layer_norm|gelu|elementwise|reduce|softmax|scatter|gather",
    ),
)


@dataclass(frozen=True)
class Kernel:
    """One stretch of work on the device; microseconds."""

    name: str
    category: str
    start: float
    duration: float


def report(job: Job, key: str, title: str, run: Callable[[], object], keep_trace: bool) -> None:
    """Profiles a few runs and records both tables.

    Args:
        keep_trace: beside the record too, if it is not too large.
    """
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "trace.json"
        _trace(job, run, path)
        content = path.read_bytes()
    kernels = parse(json.loads(content), _ON_DEVICE if job.on_gpu else ("cpu_op",))
    job.table(f"{key}-kinds", f"{title}: device time by kind", by_kind(kernels, _STEPS))
    job.table(f"{key}-kernels", f"{title}: the kernels that take longest", longest(kernels, _STEPS))
    if not keep_trace:
        return
    packed = gzip.compress(content)
    if len(packed) < MAX_TRACE_BYTES:
        job.file(f"trace-{key}.json.gz").write_bytes(packed)
    else:
        job.note(f"{title}: trace of {len(packed) / 2**20:.1f} MiB not kept")


def _trace(job: Job, run: Callable[[], object], path: Path) -> None:
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if job.on_gpu else [])]
    plan = schedule(wait=0, warmup=1, active=_STEPS, repeat=1)

    def save(profiler: profile) -> None:
        profiler.export_chrome_trace(str(path))

    with profile(activities=activities, schedule=plan, on_trace_ready=save) as profiler:
        for number in range(1 + _STEPS):
            run()
            # Not between the steps that count: the device would idle.
            if job.on_gpu and number in (0, _STEPS):
                torch.cuda.synchronize()
            profiler.step()


def parse(trace: dict, categories: Sequence[str]) -> list[Kernel]:
    """The device's work in a Chrome trace, by start."""
    kernels = [
        Kernel(event["name"], event["cat"], float(event["ts"]), float(event["dur"]))
        for event in trace["traceEvents"]
        if event.get("ph") == "X" and event.get("cat") in categories
    ]
    return sorted(kernels, key=lambda kernel: kernel.start)


def kind_of(kernel: Kernel) -> str:
    """What a kernel is for, by its name."""
    name = kernel.name.lower()
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name)), "other")


def by_kind(kernels: Sequence[Kernel], steps: int) -> list[dict[str, str | int | float]]:
    """Milliseconds and launches per step by kind, and the time in which nothing ran."""
    spent: defaultdict[str, float] = defaultdict(float)
    launches: defaultdict[str, int] = defaultdict(int)
    for kernel in kernels:
        spent[kind_of(kernel)] += kernel.duration
        launches[kind_of(kernel)] += 1
    span, busy = _span_and_busy(kernels)
    total = max(span, 1e-9)
    rows = [
        {
            "kind": kind,
            "ms per step": microseconds / steps / 1e3,
            "share of the time": microseconds / total,
            "launches per step": launches[kind] // steps,
        }
        for kind, microseconds in sorted(spent.items(), key=lambda item: -item[1])
    ]
    idle = {
        "kind": "idle",
        "ms per step": (span - busy) / steps / 1e3,
        "share of the time": (span - busy) / total,
        "launches per step": 0,
    }
    return [*rows, idle]


def longest(kernels: Sequence[Kernel], steps: int) -> list[dict[str, str | int | float]]:
    """The kernels that take most of the device's time."""
    spent: defaultdict[str, list[float]] = defaultdict(list)
    kinds = {kernel.name: kind_of(kernel) for kernel in kernels}
    for kernel in kernels:
        spent[kernel.name].append(kernel.duration)
    total = sum(map(sum, spent.values())) or 1e-9
    order = sorted(spent, key=lambda name: -sum(spent[name]))[:TOP]
    return [
        {
            "kernel": name[:90],
            "kind": kinds[name],
            "ms per step": sum(spent[name]) / steps / 1e3,
            "share": sum(spent[name]) / total,
            "launches per step": len(spent[name]) // steps,
            "us each": sum(spent[name]) / len(spent[name]),
        }
        for name in order
    ]


def _span_and_busy(kernels: Sequence[Kernel]) -> tuple[float, float]:
    """Microseconds from the first start to the last end, and those in which something ran."""
    if not kernels:
        return 0.0, 0.0
    busy, reached = 0.0, kernels[0].start
    for kernel in kernels:
        end = kernel.start + kernel.duration
        busy += max(0.0, end - max(reached, kernel.start))
        reached = max(reached, end)
    return reached - kernels[0].start, busy


def waiting_row(what: str, run: Callable[[], object]) -> dict[str, str | bool]:
    """Whether the host gets through a piece of work without waiting for the GPU, and where it waits.

    Run it when everything is compiled: compiling waits.
    """
    with _sync_debug("error"):
        try:
            run()
            return {"piece": what, "never waits": True, "waits at": ""}
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            first = place(traceback.extract_tb(error.__traceback__))
    with _sync_debug("warn"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run()
    lines = [
        _line(warning.filename, warning.lineno)
        for warning in caught
        if "synchronizing" in str(warning.message)
    ]
    return {"piece": what, "never waits": False, "waits at": "; ".join(dict.fromkeys([first, *lines]))}


def place(frames: Sequence[traceback.FrameSummary]) -> str:
    """The last line of the project in a traceback, and the last line of all."""
    ours = [frame for frame in frames if Path(frame.filename).is_relative_to(ROOT / "mlomae")
            or Path(frame.filename).is_relative_to(ROOT / "kernels")]  # fmt: skip
    last = frames[-1]
    end = _line(last.filename, last.lineno)
    if not ours or ours[-1] is last:
        return end
    return f"{_line(ours[-1].filename, ours[-1].lineno)} in {end}"


def _line(filename: str, number: int | None) -> str:
    path = Path(filename)
    shown = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-2:])
    return f"{shown}:{number}"


@contextmanager
def _sync_debug(mode: str) -> Iterator[None]:
    if not torch.cuda.is_available():
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
