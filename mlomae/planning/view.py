"""The tables of ``mlomae plan``."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from mlomae.planning.batch import LARGEST
from mlomae.planning.memory import CONTEXT_BYTES, GIB, LASTING, LOST_SHARE, NCCL_BYTES
from mlomae.planning.plan import Plan
from mlomae.planning.times import GIGA


def show(plan: Plan) -> None:
    """Prints one plan in full."""
    console = Console()
    for line in (setting(plan), verdict(plan)):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(_memory(plan))
    console.print(_assumption(plan), highlight=False, soft_wrap=True)
    if plan.transfers:
        console.print(_communication(plan))
    console.print(_batches(plan))
    console.print(time_line(plan), highlight=False, soft_wrap=True)


def show_sweep(plans: Sequence[Plan]) -> None:
    """Prints one row for each plan."""
    console = Console()
    console.print(setting(plans[0]).partition("; ")[2], highlight=False, soft_wrap=True)
    table = Table(title="by number of GPUs; memory in GiB per GPU, images per GPU")
    for name in ("GPUs", "images", "weights", "optimizer", "whole", "fits", "sent GB", "most", "ms"):
        table.add_column(name, justify="right", no_wrap=True)
    for plan in plans:
        parts, sharding = plan.phases[0].parts, plan.memory.sharding
        time = plan.time
        table.add_row(
            str(sharding.ranks),
            str(plan.memory.rank_batch("pretrain")),
            _gib(parts["weights"]),
            _gib(parts["optimizer"]),
            _gib(plan.total),
            "yes" if plan.total <= plan.limit else "no",
            f"{sum(entry.total for entry in plan.transfers) / GIGA:.2f}",
            str(max(fit.images for fit in plan.fits if not fit.checkpointing)),
            "" if time is None else f"{1e3 * time.least:.0f}…{1e3 * time.most:.0f}",
        )
    console.print(table)
    console.print(_assumption(plans[0]), highlight=False, soft_wrap=True)
    console.print(_time_source(plans[0]), highlight=False, soft_wrap=True)


def setting(plan: Plan) -> str:
    """What is planned, in words."""
    config, sharding = plan.memory.config, plan.memory.sharding
    precision = plan.memory.precision
    recomputed = "recomputed" if config.compute.activation_checkpointing else "kept"
    estimator = f", influence by {plan.memory.estimator}" if config.masking.learns else ""
    model = config.model
    return (
        f"{sharding.ranks} GPUs, {sharding.name}; {model.arch}/{model.patch_size} at "
        f"{model.size[0]} x {model.size[1]}, masks: {config.masking.policy}, {precision}, activations "
        f"{recomputed}, {config.pretrain.micro_batches} micro-batches{estimator}"
    )


def verdict(plan: Plan) -> str:
    """Whether it fits, in words."""
    fits = "fits" if plan.total <= plan.limit else "DOES NOT FIT"
    images = plan.memory.rank_batch("pretrain")
    return (
        f"{fits}: {_gib(plan.total)} of {_gib(plan.limit)} GiB per GPU with {images} pretrain images each; "
        f"the worst moment is the {plan.phases[0].name}"
    )


def time_line(plan: Plan) -> str:
    """Time of an outer iteration, in words; none is invented."""
    time, rate = plan.time, plan.rate
    if time is None or rate is None:
        return _time_source(plan)
    what = "predicted" if rate.measured else "lower bound, not a prediction"
    return (
        f"time of an outer iteration ({what}): {1e3 * time.least:.1f} ms if communication is hidden, "
        f"{1e3 * time.most:.1f} ms if nothing overlaps (arithmetic {1e3 * time.compute:.1f} ms, "
        f"communication {1e3 * time.communication:.1f} ms if links reach {time.link:g} GB/s); "
        f"{_time_source(plan)}"
    )


def _time_source(plan: Plan) -> str:
    if plan.rate is None:
        return "time: unknown; give --measured FILE for a prediction or --device NAME for a lower bound"
    kind = "" if plan.rate.measured else "lower bounds: no run reaches the peak; "
    return f"{kind}{1e-12 * plan.rate.flops_per_second:.1f} TFLOP/s per GPU, {plan.rate.source}"


def _memory(plan: Plan) -> Table:
    table = Table(title="memory per GPU at the worst moments, GiB")
    table.add_column("part")
    for phase in plan.phases:
        table.add_column(phase.name, justify="right")
    names = list(plan.phases[0].parts)
    for name in names:
        if any(phase.parts[name] for phase in plan.phases):
            lasting = " (always)" if name in LASTING else ""
            table.add_row(name + lasting, *(_gib(phase.parts[name]) for phase in plan.phases))
    runtimes = [plan.memory.runtime(phase) for phase in plan.phases]
    table.add_row("runtime (assumed)", *map(_gib, runtimes))
    table.add_section()
    totals = [phase.total + runtime for phase, runtime in zip(plan.phases, runtimes, strict=True)]
    table.add_row("whole", *map(_gib, totals))
    return table


def _assumption(plan: Plan) -> str:
    text = (
        f"assumed, not derived: {CONTEXT_BYTES / GIB:g} GiB for CUDA and its libraries, "
        f"{NCCL_BYTES / GIB:g} GiB for NCCL, {LOST_SHARE:.0%} of what comes and goes lost by the allocator; "
        "eager execution (compiled modules keep less)"
    )
    host = plan.memory.host()
    return text + (f"; in host memory {_gib(host)} GiB per rank" if host else "")


def _communication(plan: Plan) -> Table:
    table = Table(title="sent by each GPU in an average outer iteration")
    for name in ("part", "what"):
        table.add_column(name)
    for name in ("times", "MB each", "MB"):
        table.add_column(name, justify="right")
    for entry in plan.transfers:
        each, total = (f"{1e-6 * size:,.1f}" for size in (entry.bytes, entry.total))
        table.add_row(entry.part, entry.what, f"{entry.times:g}", each, total)
    table.add_section()
    table.add_row("whole", "", "", "", f"{1e-6 * sum(entry.total for entry in plan.transfers):,.1f}")
    return table


def _batches(plan: Plan) -> Table:
    table = Table(title="largest batch of all levels that fits")
    for name in ("activations", "micro-batches", "images per GPU", "images"):
        table.add_column(name, justify="left" if name == "activations" else "right")
    for fit in plan.fits:
        kept = "recomputed" if fit.checkpointing else "kept"
        images = fit.images * plan.memory.sharding.ranks
        more = "more than " if fit.images >= LARGEST // fit.micro_batches * fit.micro_batches else ""
        table.add_row(kept, str(fit.micro_batches), f"{more}{fit.images}", f"{more}{images}")
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}"
