"""The curves of all runs, as data that the page's script draws."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mlomae.report.figures import Kind, write
from mlomae.report.plots import GROUPS, Plot
from mlomae.report.reading import Run
from mlomae.report.series import Series

LOG_FROM = 100.0
"""Largest over smallest value from which a plot starts on a logarithmic axis."""


@dataclass(frozen=True)
class Panel:
    """A plot of the page.

    Attributes:
        plot: what it shows.
        data: for the script, serialisable as JSON.
        summary: its content in words.
    """

    plot: Plot
    data: dict[str, Any]
    summary: str


@dataclass(frozen=True)
class Group:
    """Plots of one level, and the runs that log none of them."""

    title: str
    panels: list[Panel] = field(default_factory=list)
    without: list[str] = field(default_factory=list)


# Drawn only where they are not 0 throughout.
_USUALLY_ZERO = ("bad_samples", "skipped_steps", "rewinds", "loss_jumps")
# MFU tells what the first one does; the others are there for the alarm about jumps.
_LEFT_OUT = (
    "flops_per_second", "peak_loss/pretrain", "peak_loss/head", "peak_loss/mask", "peak_loss/hardness",
)  # fmt: skip
_DASHES = ("", "dashed")


def curves(runs: Sequence[Run]) -> list[Group]:
    """The plots for which there is anything to draw, by group; scalars that are in none follow at the end."""
    known = {name for _, plots in GROUPS for plot in plots for name in plot.scalars}
    others = dict.fromkeys(name for run in runs for name in run.scalars if _is_other(run, name, known))
    rest = tuple(Plot((name,), name) for name in others)
    groups = (_group(runs, title, plots) for title, plots in (*GROUPS, ("Other", rest)))
    return [group for group in groups if group.panels]


def removal_chance(share: float) -> float:
    """Share of positions on which two random masks agree that remove ``share`` of the patches."""
    return share**2 + (1 - share) ** 2


def _is_other(run: Run, name: str, known: set[str]) -> bool:
    if name in known or name in _LEFT_OUT:
        return False
    return name not in _USUALLY_ZERO or bool(np.any(run.scalars[name].finite() != 0))


def _group(runs: Sequence[Run], title: str, plots: Iterable[Plot]) -> Group:
    panels, seen = [], set()
    for plot in plots:
        lines = _lines(runs, plot)
        if lines:
            seen |= {number for number, _, _ in lines}
            panels.append(_panel(runs, plot, lines))
    return Group(title, panels, [run.name for number, run in enumerate(runs) if number not in seen])


def _lines(runs: Sequence[Run], plot: Plot) -> list[tuple[int, int, Series]]:
    """(run, place in ``plot.scalars``, series) of every line with a finite value."""
    return [
        (number, place, run.scalars[name])
        for number, run in enumerate(runs)
        for place, name in enumerate(plot.scalars)
        if name in run.scalars and len(run.scalars[name].finite())
    ]


def _panel(runs: Sequence[Run], plot: Plot, lines: Sequence[tuple[int, int, Series]]) -> Panel:
    values = np.concatenate([series.finite() for _, _, series in lines])
    drawn = []
    for run, place, series in lines:
        thin = series.thinned()
        drawn.append(
            {
                "run": run,
                "style": _DASHES[place],
                "x": thin.steps.tolist(),
                "y": [_rounded(value) for value in thin.values.tolist()],
            }
        )
    shares = sorted({runs[run].removed_share for run, _, _ in lines}) if plot.chance else []
    data = {
        "title": plot.title,
        "kind": plot.kind,
        "log": bool(
            plot.kind is Kind.NUMBER
            and not plot.linear
            and values.min() > 0
            and values.max() / values.min() >= LOG_FROM
        ),
        "lines": drawn,
        "levels": [
            {"y": removal_chance(share), "label": f"chance {write(removal_chance(share), plot.kind)}"}
            for share in shares
        ],
    }
    parts = [_in_words(runs[run].name, series, plot.kind) for run, place, series in lines if place == 0]
    return Panel(plot, data, f"{plot.title} by step. {'; '.join(parts)}.")


def _in_words(name: str, series: Series, kind: Kind) -> str:
    values = series.finite()
    first, last, least, most = (
        write(float(v), kind) for v in (values[0], values[-1], values.min(), values.max())
    )
    lost = len(series.values) - len(values)
    gaps = f", {lost} values not finite" if lost else ""
    return f"{name}: from {first} to {last}, between {least} and {most}{gaps}"


def _rounded(value: float) -> float | None:
    return float(f"{value:.5g}") if math.isfinite(value) else None
