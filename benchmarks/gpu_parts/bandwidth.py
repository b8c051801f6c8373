"""The kernels against eager PyTorch, torch.compile and the device's own copy bandwidth.

For each operator and direction: the bytes that must move, the time that they take at the copy bandwidth
(the floor), the measured time and its distance to the floor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config

from benchmarks.gpu_parts.clock import copy_bandwidth
from benchmarks.gpu_parts.job import Job, OutOfTime
from benchmarks.gpu_parts.providers import (
    SHAPES,
    SMOKE,
    all_calls,
    distance,
    expectation,
    providers,
    times,
    using,
)
from benchmarks.operators import Call, Function

SHARE_OF_COPY, OVER_EAGER, OVER_COMPILE = 0.85, 1.5, 1.1
# What one operator takes to measure, in seconds.
_EACH = 2.0


@dataclass(frozen=True)
class Entry:
    """An operator at a shape, and what computes it.

    Attributes:
        judged: whether the bars are about it.
    """

    place: str
    dtype: str
    call: Call
    functions: dict[str, Function]
    judged: bool


def run(job: Job) -> Iterator[None]:
    """Compiles first; measures what the bars are about first."""
    # The compiled functions are differentiated again and again; each shape is a graph of its own.
    functorch_config.donated_buffer = False
    dynamo_config.recompile_limit = 64
    entries: list[Entry] = []
    for place, dtype, judged in _plan(job):
        if not judged and job.left() < 60:
            job.note(f"{place}, {_name(dtype)}: left out for lack of time to compile")
            continue
        for call in all_calls(SHAPES.get(place, SMOKE["smoke"]), dtype, job.device.type):
            with job.attempt(f"prepare {call.name}, {place}, {_name(dtype)}"):
                entries.append(_prepare(job, call, place, dtype, judged))
    yield
    bandwidth = copy_bandwidth(job.device)
    job.table("copy", "copy bandwidth, read and write", [{"GB/s": bandwidth / 1e9}])
    rows: dict[str, list[dict[str, str | float]]] = {}
    for entry in entries:
        if job.left() < _EACH:
            if entry.judged:
                raise OutOfTime(f"{entry.call.name}, {entry.dtype} and what follows were not measured")
            job.note(f"{entry.call.name}, {entry.place}, {entry.dtype}: left out for lack of time")
            continue
        title = f"{entry.place}, {entry.dtype}"
        with job.attempt(f"{entry.call.name}, {title}"):
            totals = _measure(job, entry, bandwidth, rows.setdefault(title, []))
            if entry.judged:
                _judge(job, entry, totals, bandwidth)
        shape = SHAPES.get(entry.place, SMOKE["smoke"])
        job.table(title, f"{title}, {shape}, medians", rows.get(title, []), shown=entry.judged)


def _plan(job: Job) -> list[tuple[str, torch.dtype, bool]]:
    """(shape, dtype, judged) in the order of their worth."""
    if job.smoke:
        return [("smoke", torch.bfloat16, True)]
    first, second, *_ = SHAPES
    judged = [(first, torch.bfloat16, True), (first, torch.float32, True)]
    return judged[:1] if job.quick else [*judged, (second, torch.bfloat16, False)]


def _prepare(job: Job, call: Call, place: str, dtype: torch.dtype, judged: bool) -> Entry:
    # On a CPU the compiler would take a minute for what a smoke run looks at once.
    functions = providers(call, job.device.type, "aot_eager" if job.smoke else "inductor")
    expected = expectation(call)
    for name, function in functions.items():
        ratio = distance(call, name, function, expected)
        if not ratio <= 1:
            raise AssertionError(f"{name} is off by {ratio:.3g} times what rounding explains")
        with using(name):
            times(call, function, torch.device("cpu"))  # once, as it will be measured
    return Entry(place, _name(dtype), call, functions, judged)


def _measure(
    job: Job, entry: Entry, bandwidth: float, rows: list[dict[str, str | float]]
) -> dict[str, float]:
    """Adds the rows of an operator; returns milliseconds of both directions by provider."""
    totals: dict[str, float] = {}
    for name, function in entry.functions.items():
        with using(name):
            found = times(entry.call, function, job.device)
        totals[name] = sum(found.values())
        for direction, milliseconds in found.items():
            moved = entry.call.forward_bytes if direction == "forward" else entry.call.backward_bytes
            floor = 1e3 * moved / bandwidth
            rows.append(
                {
                    "operator": entry.call.name,
                    "direction": direction,
                    "provider": name,
                    "ms": milliseconds,
                    "MB": moved / 1e6,
                    "floor, ms": floor,
                    "ms / floor": milliseconds / floor,
                    "share of copy bandwidth": floor / milliseconds,
                }
            )
    return totals


def _judge(job: Job, entry: Entry, totals: dict[str, float], bandwidth: float) -> None:
    call = entry.call
    fast = totals.get("triton", totals.get("fastest"))
    assert fast is not None
    what = f"{call.name}, {entry.dtype}"
    job.bar(f"{what}: eager / ours", totals["eager"] / fast, ">=", OVER_EAGER)
    job.bar(f"{what}: compile / ours", totals["compile"] / fast, ">=", OVER_COMPILE)
    if call.name.startswith(("patch_gather", "patch_scatter")):
        share = 1e3 * (call.forward_bytes + call.backward_bytes) / bandwidth / fast
        job.bar(f"{what}: share of copy bandwidth", share, ">=", SHARE_OF_COPY)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
