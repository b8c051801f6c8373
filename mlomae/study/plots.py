"""The pictures of a study: differences with their intervals, the health of the masks, and the masks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mlomae.report.figures import name_of
from mlomae.report.pictures import Latest, read_latest
from mlomae.study.comparison import CONFIDENCE, Compared, compare
from mlomae.study.plan import PlannedRun
from mlomae.study.report import DIFFERENCES, GALLERY, HEALTH, TITLES
from mlomae.study.results import Results

_DPI = 110
_COLORS = (
    "#1f77b4",
    "#d62728",
    "#2ca02c",
    "#9467bd",
    "#ff7f0e",
    "#8c564b",
    "#17becf",
    "#7f7f7f",
    "#bcbd22",
    "#e377c2",
)
_SHOWN = 10  # images in the gallery
_HEALTH = {
    "mask/agreement": "agreement of masks, as sampled",
    "mask/agreement_noiseless": "agreement, by the scores alone",
    "mask/entropy": "entropy of the scores, bits",
    "mask/saturation": "saturated scores",
}


def draw(results: Results, planned: Sequence[PlannedRun], out: Path) -> list[str]:
    """Writes the pictures that there is something to draw for; returns their names.

    Args:
        planned: runs whose folders may hold pictures; none leaves the gallery out.
    """
    names = []
    for name, figure in (
        (DIFFERENCES, _differences(results)),
        (HEALTH, _health(results)),
        (GALLERY, _gallery(planned)),
    ):
        if figure is not None:
            FigureCanvasAgg(figure)
            # The same results give the same file: names of parts without chance, no date.
            metadata = {"Date": None} if name.endswith("svg") else None
            with rc_context({"svg.hashsalt": name}):
                figure.savefig(out / name, metadata=metadata)
            names.append(name)
    return names


def _differences(results: Results) -> Figure | None:
    """A panel per figure, a row per compared arm, a mark per budget."""
    arms = {
        budget: [arm for arm in compare(results, budget) if arm.differences] for budget in results.budgets
    }
    names = [
        name
        for name in results.study.arms
        if any(name == arm.arm for found in arms.values() for arm in found)
    ]
    figures = list(
        dict.fromkeys(figure for found in arms.values() for arm in found for figure in arm.differences)
    )
    if not figures:
        return None
    plot = Figure(figsize=(3.2 + 3.4 * len(figures), 1.2 + 0.34 * len(names)), dpi=_DPI, layout="constrained")
    for axes, figure in zip(np.atleast_1d(plot.subplots(1, len(figures), sharey=True)), figures, strict=True):
        for number, (budget, found) in enumerate(arms.items()):
            _intervals(axes, found, names, figure, TITLES[budget], number, len(arms))
        axes.axvline(0, color="black", lw=0.8)
        axes.set_title(name_of(figure).text, fontsize=10)
        axes.set_xlabel("difference to the baseline, points", fontsize=8)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(labelsize=8)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=8, title=f"mean, {CONFIDENCE:.0%} interval", title_fontsize=8)
    return plot


def _intervals(
    axes: Axes,
    arms: Sequence[Compared],
    names: Sequence[str],
    figure: str,
    label: str,
    number: int,
    total: int,
) -> None:
    shift = 0.18 * (number - (total - 1) / 2)
    rows = [(arm, arm.differences[figure]) for arm in arms if figure in arm.differences]
    axes.errorbar(
        [100 * found.mean for _, found in rows],
        [names.index(arm.arm) + shift for arm, _ in rows],
        xerr=[100 * (found.half or 0.0) for _, found in rows],
        fmt="o", ms=4, lw=1.2, capsize=2, color=_COLORS[number], label=label,
    )  # fmt: skip


def _health(results: Results) -> Figure | None:
    """Means over seeds along the run, an arm per line."""
    shown = {name: text for name, text in _HEALTH.items() if any(name in row.curves for row in results.rows)}
    if not shown:
        return None
    plot = Figure(figsize=(4.2 * len(shown), 3.8), dpi=_DPI, layout="constrained")
    panels = np.atleast_1d(plot.subplots(1, len(shown)))
    for axes, (name, text) in zip(panels, shown.items(), strict=True):
        for number, arm in enumerate(results.study.arms):
            rows = [row for row in results.rows if row.arm == arm and name in row.curves]
            # Runs of one arm may have been logged at other intervals.
            rows = [row for row in rows if row.curves[name][0] == rows[0].curves[name][0]]
            if rows:
                steps = np.array(rows[0].curves[name][0]) / rows[0].iterations
                values = np.mean([row.curves[name][1] for row in rows], axis=0)
                style = ("-", "--", ":")[number // len(_COLORS) % 3]
                axes.plot(steps, values, style, lw=1.2, color=_COLORS[number % len(_COLORS)], label=arm)
        axes.set_title(text, fontsize=10)
        axes.set_xlabel("share of the run", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.set_ylim(-0.03, 1.03)
        axes.grid(alpha=0.3)
    handles = {line.get_label(): line for axes in panels for line in axes.get_lines()}
    plot.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, fontsize=8)
    return plot


def _gallery(planned: Sequence[PlannedRun]) -> Figure | None:
    """A row per arm, of its first run with pictures: what is removed of the same held-out images."""
    latest: dict[str, Latest] = {}
    for run in planned:
        if run.arm not in latest and (found := read_latest(run.path)) is not None:
            latest[run.arm] = found
    if not latest:
        return None
    count = min(_SHOWN, *(len(found.images) for found in latest.values()))
    plot = Figure(figsize=(1.6 + 0.9 * count, 0.95 * len(latest)), dpi=_DPI, layout="constrained")
    grid = plot.subplots(len(latest), count, squeeze=False)
    for row, (name, found) in zip(grid, latest.items(), strict=True):
        for axes, image, removed in zip(row, found.images, found.removed, strict=False):
            height, width = image.shape[:2]
            cells = removed.reshape(found.grid)
            hidden = np.repeat(np.repeat(cells, height // found.grid[0], 0), width // found.grid[1], 1)
            picture = np.broadcast_to(image, (height, width, 3)).copy()
            picture[hidden] = 128
            axes.imshow(picture, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    return plot
