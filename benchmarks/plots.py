"""The pictures that documents show, drawn from what a benchmark measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.environment import ROOT

IMAGES = ROOT / "docs" / "images"
_COLORS = {"fd": "#1f77b4", "fd-forward": "#ff7f0e"}


@dataclass(frozen=True)
class Curve:
    """Relative errors of one estimator: (radius, error) of fixed radii, and of the automatic one."""

    estimator: str
    panel: str
    points: Sequence[tuple[float, float]]
    chosen: tuple[float, float]


def plot_radii(curves: Sequence[Curve]) -> None:
    """Error against radius, one panel per precision and state, to docs/images/hypergradient_radius.png."""
    panels = list(dict.fromkeys(curve.panel for curve in curves))
    figure = Figure(figsize=(12, 6.5), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(panels) // 2, sharex=True, sharey=True)
    for axes, panel in zip(grid.flat, panels, strict=True):
        for curve in (curve for curve in curves if curve.panel == panel):
            color = _COLORS[curve.estimator]
            axes.loglog(*zip(*curve.points, strict=True), "o-", ms=3, lw=1.2, color=color)
            axes.plot(*curve.chosen, "*", ms=13, color=color, label=f"{curve.estimator}, automatic radius")
        axes.set_title(panel, fontsize=10)
        axes.grid(alpha=0.3)
    for axes in grid[:, 0]:
        axes.set_ylabel("relative error")
    for axes in grid[-1]:
        axes.set_xlabel("radius / ‖θ‖")
    grid[0, 0].legend(fontsize=8)
    figure.savefig(IMAGES / "hypergradient_radius.png")


def plot_mask_health(rows: Sequence[Mapping[str, Any]], chance: float) -> None:
    """Entropy, saturation and agreement over a run, to docs/images/mask_health.png.

    Args:
        rows: lines of metrics.jsonl.
        chance: agreement of independent random masks.
    """
    steps = [row["step"] for row in rows]
    figure = Figure(figsize=(12, 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    left, middle, right = figure.subplots(1, 3)
    left.plot(steps, [row["mask/entropy"] for row in rows], label="entropy, bits")
    left.plot(steps, [row["mask/saturation"] for row in rows], label="saturation")
    left.set(ylim=(-0.02, 1.05), title="scores: entropy and saturation")
    for name, label in (
        ("mask/agreement", "as sampled"),
        ("mask/agreement_noiseless", "by the scores alone"),
    ):
        middle.plot(steps, [row[name] for row in rows], label=label)
    middle.axhline(chance, ls=":", color="grey", label="independent masks")
    middle.axhline(1.0, ls="--", color="grey", label="one mask for all")
    middle.set(ylim=(0.5, 1.05), title="agreement between images")
    for name, label in (("loss/pretrain", "pretrain"), ("loss/mask", "held-out")):
        points = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        right.plot(*zip(*points, strict=True), label=label)
    right.set(title="loss")
    for axes in (left, middle, right):
        axes.set_xlabel("outer iteration")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, loc="right")
    figure.savefig(IMAGES / "mask_health.png")
