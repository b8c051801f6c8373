"""Every operator forward and backward on the CPU: native code against eager PyTorch and torch.compile."""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import mlomae_kernels
from benchmarks.operators import Call, Function, Shape, calls
from benchmarks.report import Bar, Report

WARM_UP = 3
ROUNDS = 15
SHAPES = [
    Shape(64, 196, 768, patch_size=16),
    Shape(64, 196, 192, patch_size=8),
    Shape(64, 256, 768, patch_size=16),
    Shape(64, 256, 192, patch_size=8),
    # The patches of the paper's CIFAR model: twelve numbers each.
    Shape(64, 256, 192, patch_size=2),
]
MORE_THAN_EAGER = 1.5
# A tie with the compiler is met: the same code timed twice differs by this much on a busy machine.
NOT_SLOWER_THAN_COMPILE = 1.0
SHARE_OF_EAGER_MEMORY = 0.30


def _seconds(call: Call, function: Function) -> float:
    started = time.perf_counter()
    call.run(function)
    return time.perf_counter() - started


def _measure(call: Call) -> dict[str, list[float]]:
    """Seconds of every round by provider, the providers alternating within a round."""
    torch.compiler.reset()
    functions: dict[str, Function] = {
        "native": call.operator,
        "eager": call.reference,
        "compile": torch.compile(call.reference, fullgraph=True),
    }
    rounds: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(WARM_UP + ROUNDS):
        for name, function in functions.items():
            seconds = _seconds(call, function)
            if number >= WARM_UP:
                rounds[name].append(seconds)
    return rounds


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.slug)
def test_operators(shape: Shape, report: Report) -> None:
    rows, bars = [], []
    with mlomae_kernels.implementation("native"):
        for call in calls(shape):
            seconds = _measure(call)
            ratios = {
                name: statistics.median(
                    other / native for other, native in zip(seconds[name], seconds["native"], strict=True)
                )
                for name in ("eager", "compile")
            }
            medians = {name: statistics.median(values) for name, values in seconds.items()}
            rows.append(
                {
                    "operator": call.name,
                    **{f"{name}, ms": 1e3 * medians[name] for name in ("eager", "compile", "native")},
                    "native, GB/s": (call.forward_bytes + call.backward_bytes) / medians["native"] / 1e9,
                    "eager / native": ratios["eager"],
                    "compile / native": ratios["compile"],
                }
            )
            bars += [
                Bar(f"{call.name}: eager / native", ratios["eager"], ">=", MORE_THAN_EAGER),
                Bar(f"{call.name}: compile / native", ratios["compile"], ">=", NOT_SLOWER_THAN_COMPILE),
            ]
    report.table(
        f"{shape}, float32, forward and backward on the CPU, medians of {ROUNDS} alternating rounds", rows
    )
    report.check(*bars)


def _peak_bytes(call: Call, function: Function) -> int:
    """Most memory that tensors made inside the call take at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call.run(function)
    assert profiler.profiler is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    allocated = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        allocated += event.nbytes()
        peak = max(peak, allocated)
    return peak


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.slug)
def test_loss_memory(shape: Shape, report: Report) -> None:
    rows, bars = [], []
    with mlomae_kernels.implementation("native"):
        for call in calls(shape):
            if not call.name.startswith("masked_patch_loss"):
                continue
            peak = {
                name: _peak_bytes(call, function)
                for name, function in (("eager", call.reference), ("native", call.operator))
            }
            share = peak["native"] / peak["eager"]
            rows.append(
                {
                    "operator": call.name,
                    **{f"{name}, MB": size / 1e6 for name, size in peak.items()},
                    "native / eager": share,
                }
            )
            bars.append(Bar(f"{call.name}: peak memory, native / eager", share, "<=", SHARE_OF_EAGER_MEMORY))
    report.table(f"{shape}: peak memory beyond the inputs, forward and backward", rows)
    report.check(*bars)
