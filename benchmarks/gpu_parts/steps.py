"""A plain pretraining step: forward, backward and optimizer in milliseconds, images/s, share of the peak."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from benchmarks.gpu_parts import profiling
from benchmarks.gpu_parts.clock import Clock, copy_bandwidth, forget_peak, peak_gib
from benchmarks.gpu_parts.floors import Floor, floor, work_row
from benchmarks.gpu_parts.job import Job
from benchmarks.gpu_parts.models import PretrainStep, model_for
from mlomae.peaks import data_sheet_peak, measured_peak

WARM_UP, ROUNDS = 3, 20
# Two bf16 runs of the same gradient differ by about 1 %; a wrong kernel by far more.
GRADIENT_TOLERANCE = 0.1


@dataclass(frozen=True)
class Variant:
    """A way to run the step."""

    name: str
    execution: str
    fused: bool


VARIANTS = (
    Variant("compiled, fused AdamW", "compiled", True),
    Variant("eager, fused AdamW", "eager", True),
    Variant("eager, foreach AdamW", "eager", False),
    Variant("compiled with CUDA graphs, fused AdamW", "graphs", True),
)
JUDGED = VARIANTS[0]


@dataclass(frozen=True)
class Rates:
    """Per second: operations measured and by the data sheet, bytes copied."""

    measured: float | None
    sheet: float | None
    bandwidth: float


def run(job: Job) -> Iterator[None]:
    """Compiles first; then every variant after the other, on the same weights."""
    model = model_for(job.argument, job.device, job.smoke)
    work = floor(model)
    job.table("work", f"{model.title}: least work of a step", [work_row(work)])
    step = PretrainStep(model, job.device, job.smoke)
    variants = _variants(job)
    for execution in dict.fromkeys(variant.execution for variant in variants if variant.execution != "eager"):
        # Whoever shares the device may leave too little memory; there is a second try while measuring.
        with job.attempt(f"compile: {execution}", needed=False):
            step.optimise(fused=True)
            step.use(execution)
            for _ in range(1 if job.smoke else WARM_UP):
                step.once()
    step.release()
    yield
    rates = _rates(job)
    rows: list[dict[str, str | int | float | None]] = []
    for variant in variants:
        job.require(2 if job.smoke else 6, variant.name)
        with job.attempt(f"{model.title}, {variant.name}"):
            rows.append(_measure(job, step, variant, work, rates))
            job.table("steps", f"{model.title}, batch {model.batch}, bf16 autocast", rows)
    step.release()
    if model.compiled_mfu is not None:
        found = [row for row in rows if row["variant"] == JUDGED.name]
        share = found[0]["MFU, measured peak"] if found else None
        assert share is None or isinstance(share, float)
        job.bar(f"{model.title}, compiled: MFU of the measured peak", share, ">=", model.compiled_mfu)
    with job.attempt(f"{model.title}: compiled gradient"):
        off = _gradient_off(step, JUDGED.execution)
        what = f"{model.title}: compiled gradient off from eager"
        job.bar(what, off, "<=", GRADIENT_TOLERANCE, timed=False)
    with job.attempt(f"{model.title}: profile"):
        job.require(2 if job.smoke else 8, "profile")
        step.optimise(fused=True)
        step.use(JUDGED.execution)
        key, title = f"step-{model.key}", f"{model.title}, a compiled step"
        profiling.report(job, key, title, step.once, keep_trace=job.argument == "l16")


def _variants(job: Job) -> list[Variant]:
    if job.quick:
        return list(VARIANTS[:2])
    # Graphs help where kernels are short: the smallest model.
    return [v for v in VARIANTS if v.execution != "graphs" or job.argument == "b16" or job.smoke]


def _rates(job: Job) -> Rates:
    name = torch.cuda.get_device_name() if job.on_gpu else "cpu"
    return Rates(
        None if job.smoke else measured_peak(job.device, "bf16"),
        data_sheet_peak(name, "bf16"),
        copy_bandwidth(job.device),
    )


def _measure(
    job: Job, step: PretrainStep, variant: Variant, work: Floor, rates: Rates
) -> dict[str, str | int | float | None]:
    step.optimise(variant.fused)
    step.use(variant.execution)
    for _ in range(1 if job.smoke else WARM_UP):
        step.once()
    clock = Clock(job.device)
    clock.wait()
    forget_peak(job.device)
    marks, rounds = [], 1 if job.smoke else ROUNDS
    started = time.perf_counter()
    for _ in range(rounds):
        row = [clock.mark()]
        loss = step.loss()
        row.append(clock.mark())
        loss.backward()
        row.append(clock.mark())
        step.update()
        row.append(clock.mark())
        marks.append(row)
    clock.wait()
    seconds = (time.perf_counter() - started) / rounds
    forward, backward, optimizer = (
        statistics.median(clock.between(row[part], row[part + 1]) for row in marks) for part in range(3)
    )
    least = (
        None if rates.measured is None else work.milliseconds(rates.measured, rates.bandwidth)["floor, ms"]
    )
    return {
        "model": work.model.title,
        "batch": work.model.batch,
        "variant": variant.name,
        "forward, ms": forward,
        "backward, ms": backward,
        "optimizer, ms": optimizer,
        "step, ms": 1e3 * seconds,
        "images/s": work.model.batch / seconds,
        "MFU, measured peak": None if rates.measured is None else work.flops / seconds / rates.measured,
        "MFU, data sheet": None if rates.sheet is None else work.flops / seconds / rates.sheet,
        "peak, GiB": peak_gib(job.device),
        "floor, ms": least,
        "step / floor": None if least is None else 1e3 * seconds / least,
        "loss": float(loss.detach()),
    }


def _gradient_off(step: PretrainStep, execution: str) -> float:
    """Relative distance of the gradients of one batch, the same masks, between two executions."""
    found: list[list[torch.Tensor]] = []
    for way in ("eager", execution):
        step.use(way)
        step.module.zero_grad(set_to_none=True)
        torch.manual_seed(0)
        step.loss().backward()
        found.append([p.grad.clone() for p in step.module.parameters() if p.grad is not None])
    step.module.zero_grad(set_to_none=True)
    eager, other = found
    apart = torch._foreach_norm(torch._foreach_sub(other, eager))
    size = torch._foreach_norm(eager)
    norms = [torch.linalg.vector_norm(torch.stack(list(norm))) for norm in (apart, size)]
    return float(norms[0] / norms[1])
