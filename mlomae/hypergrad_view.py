"""The result of ``mlomae hypergrad-check`` as a table and as a picture."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from mlomae.errors import UserError
from mlomae.hypergrad_check import Check
from mlomae.run_dir import write_atomically

MIB = 2**20
_COLORS = {"fd": "#1f77b4", "fd-forward": "#ff7f0e", "jvp": "#2ca02c", "exact": "#7f7f7f"}


def show(result: Check) -> None:
    """Prints the table; the run's own estimator is marked."""
    table = Table(title=f"hypergradient at iteration {result.iteration}, {_setting(result)}")
    table.add_column("estimator")
    for name in ("cosine", "relative error", "ms", "peak MiB", "radius / ‖θ‖"):
        table.add_column(name, justify="right")
    for estimate in result.estimates:
        radius = result.radii.get(estimate.estimator)
        table.add_row(
            estimate.estimator + (" *" if estimate.estimator == result.chosen else ""),
            f"{estimate.cosine:.6f}",
            f"{estimate.relative_error:.1e}",
            f"{1e3 * estimate.seconds:.1f}",
            f"{estimate.peak_bytes / MIB:.1f}",
            "" if radius is None else f"{radius:.1e}",
        )
    console = Console()
    console.print(table)
    console.print(
        f"* this configuration's own. Time and memory are those of the influence; the direction, which all "
        f"share, took {1e3 * result.direction_seconds:.0f} ms. Errors are against float64.",
        highlight=False,
    )


def draw(result: Check, path: Path) -> None:
    """Writes a PNG: error against radius, and error against price.

    Raises:
        UserError: the file cannot be written.
    """
    figure = Figure(figsize=(10, 4.2), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    errors = {estimate.estimator: estimate.relative_error for estimate in result.estimates}
    for name, points in result.curves.items():
        radii, values = zip(*points, strict=True)
        left.loglog(radii, values, "o-", ms=3, lw=1.2, color=_COLORS[name], label=f"{name}, fixed radius")
        left.plot(
            result.radii[name], errors[name], "*", ms=14, color=_COLORS[name], label=f"{name}, chosen radius"
        )
    for name in (name for name in errors if name not in result.curves):
        left.axhline(errors[name], ls="--", lw=1, color=_COLORS[name], label=name)
    left.set(xlabel="radius / ‖θ‖", ylabel="relative error", title="error against radius")
    left.legend(fontsize=8)
    for estimate in result.estimates:
        x, y = 1e3 * estimate.seconds, estimate.relative_error
        right.plot(x, y, "o", ms=8, color=_COLORS[estimate.estimator])
        label = f"{estimate.estimator}, {estimate.peak_bytes / MIB:.1f} MiB"
        right.annotate(label, (x, y), textcoords="offset points", xytext=(6, 6), fontsize=9)
    right.margins(x=0.3)
    right.set_xlim(left=0)
    right.set(xlabel="time of the influence, ms", title="error against price")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(f"Hypergradient at iteration {result.iteration}, {_setting(result)}")
    content = io.BytesIO()
    figure.savefig(content, format="png")
    try:
        write_atomically(path, content.getvalue())
    except OSError as error:
        raise UserError(f"--plot {path}: cannot be written ({error.strerror})") from None


def _setting(result: Check) -> str:
    return f"{result.images} images, {result.precision}"
