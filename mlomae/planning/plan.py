"""A plan: memory, communication, time and the largest batch of a run on some number of GPUs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mlomae.planning.batch import Fit, largest_batches
from mlomae.planning.memory import Memory, Phase
from mlomae.planning.times import Rate, Time, iteration_time
from mlomae.planning.traffic import Transfer, transfers


@dataclass(frozen=True)
class Plan:
    """Everything that the command shows of one number of GPUs.

    Attributes:
        memory: of a rank, and the configuration behind it.
        limit: bytes of a GPU.
        phases: of an outer iteration, the worst first.
        runtime: bytes that a GPU needs beside its tensors; an assumption.
        transfers: what a rank sends.
        fits: the largest batches.
        rate: FLOP/s of a GPU; None where neither a measurement nor a device was given.
        time: None without ``rate``.
    """

    memory: Memory
    limit: int
    phases: list[Phase]
    runtime: int
    transfers: list[Transfer]
    fits: list[Fit]
    rate: Rate | None
    time: Time | None

    @property
    def total(self) -> int:
        """Bytes of a GPU at the worst moment."""
        return self.phases[0].total + self.runtime


def make_plan(
    memory: Memory, limit: int, rate: Rate | None, links: tuple[float, float], per_node: int
) -> Plan:
    """The plan of one number of GPUs.

    Raises:
        UserError: ranks or micro-batches do not divide a batch.
    """
    phases = sorted(memory.phases(), key=lambda phase: -phase.total)
    return Plan(
        memory=memory,
        limit=limit,
        phases=phases,
        runtime=memory.runtime(phases[0]),
        transfers=transfers(memory),
        fits=largest_batches(memory, limit),
        rate=rate,
        time=None if rate is None else iteration_time(memory, rate, links, per_node),
    )


def values(plan: Plan) -> dict[str, Any]:
    """A plan as plain values: bytes, seconds, images."""
    sharding, config = plan.memory.sharding, plan.memory.config
    return {
        "gpus": sharding.ranks,
        "sharding": sharding.name,
        "batch": {
            level: getattr(config, level).batch_size for level in ("pretrain", "head", "mask")
        },
        "memory": {
            "bytes": plan.total,
            "limit": plan.limit,
            "fits": plan.total <= plan.limit,
            "runtime_assumed": plan.runtime,
            "host": plan.memory.host(),
            "phases": [
                {"phase": phase.name, "bytes": phase.total, "parts": dict(phase.parts)}
                for phase in plan.phases
            ],
        },
        "communication": {
            "bytes_per_iteration": sum(entry.total for entry in plan.transfers),
            "transfers": [asdict(entry) | {"total": entry.total} for entry in plan.transfers],
        },
        "largest_batch": [
            asdict(fit) | {"global_images": fit.images * sharding.ranks} for fit in plan.fits
        ],
        "time": None if plan.time is None or plan.rate is None else {
            "flops_per_second": plan.rate.flops_per_second,
            "source": plan.rate.source,
            "measured": plan.rate.measured,
            "seconds_compute": plan.time.compute,
            "link_gb_per_second": plan.time.link,
            "seconds_communication": plan.time.communication,
            "seconds_if_all_overlaps": plan.time.least,
            "seconds_if_nothing_overlaps": plan.time.most,
        },
    }  # fmt: skip
