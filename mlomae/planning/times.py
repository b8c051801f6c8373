"""Time of an outer iteration: a prediction from a measurement, or a bound from the device's peak."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlomae.errors import UserError
from mlomae.flops import iteration_flops
from mlomae.planning.memory import Memory
from mlomae.planning.traffic import transfers

GIGA = 1e9


@dataclass(frozen=True)
class Rate:
    """FLOP/s of one GPU.

    Attributes:
        flops_per_second: model FLOPs.
        source: in words.
        measured: by a run; otherwise the device's peak, which no run reaches.
    """

    flops_per_second: float
    source: str
    measured: bool


@dataclass(frozen=True)
class Time:
    """Seconds of an average outer iteration.

    Attributes:
        compute: of the arithmetic.
        communication: of all transfers, one after the other.
        link: GB/s that the transfers were given.
    """

    compute: float
    communication: float
    link: float

    @property
    def least(self) -> float:
        """Where arithmetic hides all communication, or the other way round."""
        return max(self.compute, self.communication)

    @property
    def most(self) -> float:
        """Where nothing overlaps."""
        return self.compute + self.communication


def iteration_time(memory: Memory, rate: Rate, links: tuple[float, float], per_node: int) -> Time:
    """Of an average outer iteration on all ranks.

    Args:
        links: GB/s that a GPU sends within a node, and between nodes: a ring that leaves the node runs at the
            slower of the two.
        per_node: GPUs of a node.
    """
    config, ranks = memory.config, memory.sharding.ranks
    flops = iteration_flops(config, memory.num_classes, memory.estimator if config.masking.learns else None)
    if config.compute.activation_checkpointing:
        # Blocks are computed again: a forward pass more, of three.
        flops |= {name: flops[name] * 4 / 3 for name in ("pretrain", "direction") if name in flops}
    link = links[0] if ranks <= per_node else min(links)
    sent = sum(entry.total for entry in transfers(memory))
    return Time(sum(flops.values()) / ranks / rate.flops_per_second, sent / (GIGA * link), link)


def read_rate(path: Path) -> Rate:
    """FLOP/s of ``mlomae profile --json``, or of a record of ``benchmarks/gpu.py``: its fastest whole step.

    Raises:
        UserError: it cannot be read, or holds neither.
    """
    where = f"--measured {path}"
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    found = _profiled(content) if isinstance(content, dict) else None
    found = found or (_recorded(content) if isinstance(content, dict) else None)
    if found is None:
        raise UserError(
            f"{where}: found no FLOP/s of a run, expected the output of `mlomae profile --json` or a record "
            "of benchmarks/gpu.py with a part that trains"
        )
    rate, source = found
    return Rate(rate, f"{source} ({path.name})", measured=True)


def _profiled(content: Mapping[str, Any]) -> tuple[float, str] | None:
    figures = content.get("figures")
    rate = figures.get("flops_per_second") if isinstance(figures, dict) else None
    if not isinstance(rate, int | float) or rate <= 0:
        return None
    return float(rate), f"measured on {content.get('device', 'an unknown device')}"


def _recorded(content: Mapping[str, Any]) -> tuple[float, str] | None:
    """The fastest step of a record: the FLOPs of its table ``work`` over the times of its table ``steps``."""
    found: list[tuple[float, str]] = []
    parts = content.get("parts")
    for part in parts.values() if isinstance(parts, dict) else ():
        tables = part.get("tables", {})
        if not {"work", "steps"} <= set(tables):
            continue
        flops = tables["work"]["rows"][0].get("TFLOP/step")
        for row in tables["steps"]["rows"]:
            # A smoke run records no figures.
            if flops and row.get("step, ms"):
                rate = 1e12 * flops / (1e-3 * row["step, ms"])
                found.append((rate, f"measured: {row['model']}, batch {row['batch']}, {row['variant']}"))
    return max(found, default=None)
