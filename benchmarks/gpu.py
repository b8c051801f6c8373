"""The operators on a GPU, against eager PyTorch, torch.compile and the device's own copy bandwidth.

    python benchmarks/gpu.py              every shape; writes a record to benchmarks/results
    python benchmarks/gpu.py --quick      the first shape only
    TRITON_INTERPRET=1 python benchmarks/gpu.py --smoke
                                          no GPU: runs every provider once on a tiny shape, times nothing

For each operator and direction the table shows the bytes that must move, the time that they take at the
measured copy bandwidth (the floor), the measured time and its distance to the floor. A provider is timed only
after its results agree with plain PyTorch in float64. Exit code 1 when a bar is missed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Run as a script, the folder of this file comes first on the path and hides the package.
sys.path[0] = str(Path(__file__).resolve().parents[1])

import mlomae_kernels
from benchmarks.environment import RESULTS, environment
from benchmarks.operators import Call, Function, Shape, calls
from benchmarks.report import Bar, Report, Row
from mlomae_kernels._native import CUDA_OPERATORS, native_status

# The shapes that the bars are about come first.
SHAPES = {
    "ViT-L/16 encoder": Shape(256, 196, 1024, patch_size=16),
    "MAE decoder": Shape(256, 196, 512, patch_size=16),
    "ViT-B/2, CIFAR": Shape(256, 256, 768, patch_size=2),
    "ViT-H/14": Shape(128, 256, 1280, patch_size=14),
}
DTYPES = (torch.bfloat16, torch.float32)
SHARE_OF_COPY, OVER_EAGER, OVER_COMPILE = 0.85, 1.5, 1.1
COPY_BYTES = 2**30


def main(argv: Sequence[str] | None = None) -> int:
    options = _options(argv)
    if options.smoke:
        for call in calls(Shape(2, 9, 64, patch_size=2)):
            for name, function in _providers(call, "cpu", compiled=False).items():
                _check(call, name, function)
        print("smoke run: every provider agrees with plain PyTorch; nothing was timed")
        return 0
    if not torch.cuda.is_available():
        print("gpu.py: found no CUDA device; --smoke runs everything once without one", file=sys.stderr)
        return 2
    device = torch.cuda.get_device_name()
    command = " ".join(["python", "benchmarks/gpu.py", *(argv or sys.argv[1:])])
    report = Report("gpu_operators", command, environment(device), nullcontext)
    bandwidth = _copy_bandwidth()
    report.say(f"{device}: copies {COPY_BYTES / 2**30:.0f} GiB at {bandwidth / 1e9:,.0f} GB/s (read + write)")
    report.table("copy bandwidth", [{"device": device, "GB/s": bandwidth / 1e9}])
    bars: list[Bar] = []
    for place, shape in list(SHAPES.items())[: 1 if options.quick else None]:
        for dtype in DTYPES:
            bars += _measure_shape(report, place, shape, dtype, bandwidth, judged=place == next(iter(SHAPES)))
    try:
        report.check(*bars)
    except AssertionError:
        return 1
    finally:
        report.write(RESULTS)
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="the first shape only")
    parser.add_argument("--smoke", action="store_true", help="run everything once, without a GPU")
    return parser.parse_args(argv)


def _providers(call: Call, device_type: str, compiled: bool = True) -> dict[str, Function]:
    """Functions by name; triton and native are the operator within ``_using(name)``."""
    providers: dict[str, Function] = {"eager": call.reference}
    if compiled:
        providers["compile"] = torch.compile(call.reference, fullgraph=True, dynamic=False)
    if call.name == "attention":
        return {**providers, "fastest": call.operator}
    providers["triton"] = call.operator
    operator = call.name.partition(",")[0]
    if native_status(device_type).available and (device_type == "cpu" or operator in CUDA_OPERATORS):
        providers["native"] = call.operator
    return providers


def _using(provider: str) -> AbstractContextManager[None]:
    return mlomae_kernels.implementation(provider) if provider in ("triton", "native") else nullcontext()


def _check(call: Call, name: str, function: Function) -> None:
    """Compares with plain PyTorch in float64 before anything is timed.

    Raises:
        AssertionError: naming the operator and provider.
    """
    with _using(name):
        results = call.run(function)
    wide = [_double(value) for value in call.inputs]
    expected = call.reference(*wide)
    if call.leaves:
        leaves = [
            wide[i] for i, value in enumerate(call.inputs) if any(value is leaf for leaf in call.leaves)
        ]
        assert call.cotangent is not None
        expected = [expected, *torch.autograd.grad(expected, leaves, call.cotangent.double())]
    for got, want in zip(results, expected, strict=True):
        # One rounding of the result, and of the intermediate ones of the attention.
        tolerance = 4 * torch.finfo(got.dtype).eps if got.is_floating_point() else 0.0
        scale = max(1.0, want.abs().max().item())
        error = (got.double() - want.double()).abs().max().item() / scale
        assert error <= tolerance + 1e-5, f"{call.name}, {name}: off by {error:.1e} of the largest value"


def _double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value


def _milliseconds(run: Callable[[], Any]) -> float:
    from triton.testing import do_bench

    # do_bench empties the L2 cache before each run.
    median = do_bench(run, warmup=50, rep=200, return_mode="median")
    assert isinstance(median, float)
    return median


def _copy_bandwidth() -> float:
    """Bytes read and written per second by a large copy."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (1e-3 * _milliseconds(lambda: target.copy_(source)))


def _time(call: Call, function: Function) -> dict[str, float]:
    """Milliseconds of each direction."""
    times = {"forward": _milliseconds(lambda: function(*call.inputs))}
    if call.leaves:
        result = function(*call.inputs)
        times["backward"] = _milliseconds(lambda: call.backward(result))
    return times


def _measure_shape(
    report: Report, place: str, shape: Shape, dtype: torch.dtype, bandwidth: float, judged: bool
) -> list[Bar]:
    """Shows every operator at one shape; returns the bars if this shape is ``judged``."""
    rows: list[Row] = []
    bars: list[Bar] = []
    for call in calls(shape, dtype, "cuda"):
        torch.compiler.reset()
        totals: dict[str, float] = {}
        for name, function in _providers(call, "cuda").items():
            _check(call, name, function)
            with _using(name):
                times = _time(call, function)
            totals[name] = sum(times.values())
            for direction, milliseconds in times.items():
                moved = call.forward_bytes if direction == "forward" else call.backward_bytes
                floor = 1e3 * moved / bandwidth
                rows.append(
                    {
                        "operator": call.name,
                        "direction": direction,
                        "provider": name,
                        "ms": milliseconds,
                        "MB": moved / 1e6,
                        "floor, ms": floor,
                        "ms / floor": milliseconds / floor,
                        "share of copy bandwidth": floor / milliseconds,
                    }
                )
        bars += _bars(call, dtype, totals, bandwidth)
    report.table(f"{place}, {shape}, {str(dtype).removeprefix('torch.')}, medians", rows)
    return bars if judged else []


def _bars(call: Call, dtype: torch.dtype, totals: dict[str, float], bandwidth: float) -> list[Bar]:
    fast = totals.get("triton", totals.get("fastest"))
    assert fast is not None
    what = f"{call.name}, {str(dtype).removeprefix('torch.')}"
    bars = [
        Bar(f"{what}: eager / ours", totals["eager"] / fast, ">=", OVER_EAGER),
        Bar(f"{what}: compile / ours", totals["compile"] / fast, ">=", OVER_COMPILE),
    ]
    if call.name.startswith(("patch_gather", "patch_scatter")):
        share = 1e3 * (call.forward_bytes + call.backward_bytes) / bandwidth / fast
        bars.append(Bar(f"{what}: share of copy bandwidth", share, ">=", SHARE_OF_COPY))
    return bars


if __name__ == "__main__":
    sys.exit(main())
