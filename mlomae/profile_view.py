"""The result of ``mlomae profile``: tables, plain values for ``--json``, and the trace file."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlomae.errors import UserError
from mlomae.profile_times import PartTime
from mlomae.profiling import Profile
from mlomae.run_dir import temporary_for, write_atomically

MIB = 2**20
_NUMBERS_WIDTH = 36
"""Of a table of operators: its numbers and frame."""


def show(result: Profile) -> None:
    """Prints the tables, and below them speed, memory and what the profiler itself costs."""
    console = Console()
    console.print(result.implementations, highlight=False, soft_wrap=True)
    console.print(_setting(result), highlight=False, soft_wrap=True)
    console.print(_parts(result))
    console.print(_kinds(result))
    console.print(_operators(result, console.width))
    for line in _lines(result):
        console.print(line, highlight=False, soft_wrap=True)


def values(result: Profile) -> dict[str, Any]:
    """Everything but the trace as plain values; times in seconds, per outer iteration."""
    return {
        "device": result.device,
        "implementations": result.implementations,
        "first_iteration": result.first,
        "iterations": result.iterations,
        "hypergradients": result.due,
        "seconds": result.seconds,
        "profiled_seconds": result.profiled_seconds,
        "peak_flops_per_second": result.peak_flops,
        "figures": dict(result.figures),
        "parts": [{**asdict(row), "flops_per_second": row.flops_per_second} for row in result.parts],
        "kinds": [asdict(row) for row in result.kinds],
        "operators": [asdict(row) for row in result.operators],
    }


def check_writable(flag: str, path: Path) -> None:
    """Finds out now, and not after minutes, whether a file can be written.

    Raises:
        UserError: it cannot.
    """
    try:
        if path.is_dir():
            raise UserError(f"{flag} {path}: is a folder, expected the name of a file")
        temporary = temporary_for(path)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise _refusal(flag, path, error) from None


def write(flag: str, path: Path, content: bytes) -> None:
    """Replaces a file in one step.

    Raises:
        UserError: it cannot be written.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise _refusal(flag, path, error) from None


def packed(path: Path, trace: bytes) -> bytes:
    """The trace as a file of this name holds it."""
    return gzip.compress(trace, mtime=0) if path.suffix == ".gz" else trace


def _refusal(flag: str, path: Path, error: OSError) -> UserError:
    return UserError(f"{flag} {path}: cannot be written ({error.strerror})")


def _parts(result: Profile) -> Table:
    on_gpu = result.parts[0].device_seconds is not None
    table = Table(title="by part")
    table.add_column("part")
    for name in (*(("device ms", "host ms") if on_gpu else ("ms",)), "share", "GFLOP", "GFLOP/s"):
        table.add_column(name, justify="right")

    def row(part: PartTime, share: str) -> list[str]:
        times = (part.device_seconds, part.host_seconds) if on_gpu else (part.host_seconds,)
        rate, flops = part.flops_per_second, part.flops
        return [
            part.part,
            *("" if time is None else f"{1e3 * time:.2f}" for time in times),
            share,
            "" if flops is None else f"{1e-9 * flops:,.3f}",
            "" if rate is None else f"{1e-9 * rate:,.1f}",
        ]

    for part in result.parts:
        table.add_row(*row(part, _percent(part.share)))
    table.add_section()
    table.add_row(*row(_sum(result.parts, on_gpu), _percent(sum(part.share for part in result.parts))))
    return table


def _sum(parts: Sequence[PartTime], on_gpu: bool) -> PartTime:
    device = sum(part.device_seconds or 0 for part in parts) if on_gpu else None
    host = sum(part.host_seconds or 0 for part in parts)
    return PartTime("whole", host, device, 1.0, sum(part.flops or 0 for part in parts))


def _kinds(result: Profile) -> Table:
    table = Table(title="by kind")
    table.add_column("kind")
    table.add_column("ms", justify="right")
    table.add_column("share", justify="right")
    for kind in result.kinds:
        table.add_row(kind.kind, f"{1e3 * kind.seconds:.2f}", _percent(kind.share))
    return table


def _operators(result: Profile, width: int) -> Table:
    table = Table(title=f"{len(result.operators)} most expensive operators, without what they call")
    table.add_column("operator", no_wrap=True)
    for name in ("calls", "ms", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    room = max(width - _NUMBERS_WIDTH, 20)
    for operator in result.operators:
        table.add_row(
            Text(_shortened(operator.operator.removeprefix("void "), room)),
            f"{operator.calls:.4g}",
            f"{1e3 * operator.seconds:.2f}",
            _percent(operator.share),
        )
    return table


def _shortened(name: str, room: int) -> str:
    """Without its middle, if it is too long: kernels have the names of their templates, which fill lines."""
    tail = room // 3
    return name if len(name) <= room else f"{name[: room - tail - 1]}…{name[-tail:]}"


def _lines(result: Profile) -> list[str]:
    figures, before, after = result.figures, 1e3 * result.seconds, 1e3 * result.profiled_seconds
    use = [f"waiting for data {_percent(figures['data_wait'])}"]
    if "mfu" in figures and result.peak_flops:
        use.insert(0, f"MFU {_percent(figures['mfu'])} of {1e-9 * result.peak_flops:,.0f} GFLOP/s, measured")
    if "memory/peak_bytes" in figures:
        use.append(f"peak memory {figures['memory/peak_bytes'] / MIB:,.0f} MiB")
    speed = f"{before:.1f} ms, {figures['images_per_second']:,.0f} images/s"
    return [
        f"without the profiler: {'; '.join([speed, *use])}",
        f"with it: {after:.1f} ms ({after / before - 1:+.0%}), which small operators bear",
    ]


def _setting(result: Profile) -> str:
    last = result.first + result.iterations - 1
    which = f"iteration {result.first}" if last == result.first else f"iterations {result.first} to {last}"
    taken = f"{result.due} with a hypergradient"
    return f"outer {which} on {result.device}, {taken}; times are per iteration, with the profiler on"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
