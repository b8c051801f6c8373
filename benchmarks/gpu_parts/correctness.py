"""Every kernel against plain PyTorch in float64, forward and backward, at all shapes and in all dtypes."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu_parts.job import Job, OutOfTime, free_memory
from benchmarks.gpu_parts.providers import (
    AWKWARD,
    DTYPES,
    SHAPES,
    SMOKE,
    all_calls,
    distance,
    expectation,
    has_native,
    providers,
)
from mlomae_kernels._native import native_status

Rows = list[dict[str, str | float | bool | None]]


def run(job: Job) -> Iterator[None]:
    """Nothing is timed, so that this part has no second half."""
    shapes = SMOKE if job.smoke else {**AWKWARD, **SHAPES}
    if job.quick:
        shapes = dict(list(shapes.items())[:2])
    if not has_native(job.device.type):
        job.note(f"native: {native_status(job.device.type).reason}")
    rows: Rows = []
    # Native code last: a wrong index in it can end the process.
    passes = [("eager", "fastest", "triton"), *([("native",)] if has_native(job.device.type) else [])]
    for chosen in passes:
        for place, shape in shapes.items():
            for dtype in DTYPES:
                if job.left() < 5:
                    raise OutOfTime(f"{place}, {dtype} and what follows were not checked")
                for call in all_calls(shape, dtype, job.device.type):
                    found = providers(call, job.device.type)
                    wanted = [name for name in found if name in chosen]
                    expected = expectation(call) if wanted else []
                    for name in wanted:
                        what = f"{call.name}, {name}, {place}, {_name(dtype)}"
                        ratio = None
                        with job.attempt(what):
                            ratio = distance(call, name, found[name], expected)
                        rows.append(_row(call.name, name, place, _name(dtype), ratio))
                _tables(job, rows)
                free_memory()
    wrong = [row for row in rows if not row["agrees"]]
    for row in wrong:
        job.note(f"NOT RIGHT: {row['operator']}, {row['provider']}, {row['shape']}, {row['dtype']}")
    job.bar("kernels not shown to agree with plain PyTorch", float(len(wrong)), "<=", 0, timed=False)
    if not wrong:
        job.note("every provider agrees with plain PyTorch in float64")
    yield from ()


def _row(operator: str, provider: str, shape: str, dtype: str, ratio: float | None) -> dict:
    return {
        "operator": operator,
        "provider": provider,
        "shape": shape,
        "dtype": dtype,
        "error / tolerance": ratio,
        # A NaN is no agreement.
        "agrees": ratio is not None and ratio <= 1,
    }


def _tables(job: Job, rows: Rows) -> None:
    job.table("all", "every case", rows, shown=False)
    kinds = dict.fromkeys((row["operator"], row["provider"]) for row in rows)
    worst = []
    for kind in kinds:
        those = [row for row in rows if (row["operator"], row["provider"]) == kind]
        ratios = [row["error / tolerance"] for row in those]
        worst.append(
            {
                "operator": kind[0],
                "provider": kind[1],
                "cases": len(those),
                "largest error / tolerance": None if None in ratios else max(ratios),
                "all agree": all(row["agrees"] for row in those),
            }
        )
    job.table("worst", "against plain PyTorch in float64: forward and gradients", worst)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
