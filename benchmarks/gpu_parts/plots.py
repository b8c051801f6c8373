"""Pictures of a record: each is drawn where the record holds its figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
_SIZES = ("b16", "l16", "h14")
_SPLIT = {"forward, ms": "#1f77b4", "backward, ms": "#ff7f0e", "optimizer, ms": "#2ca02c"}


def draw(record: Mapping[str, Any], folder: Path, stamp: str) -> list[str]:
    """Draws what there is to draw.

    Returns:
        What could not be drawn and why.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    problems = []
    where = f"{record['machine']['device']}, {record['date'][:10]}"
    for name, (find, paint) in _PICTURES.items():
        try:
            rows = find(record)
            if not rows:
                continue
            figure = Figure(figsize=(11, 0.9 + 0.42 * max(len(rows), 4)), dpi=110, layout="constrained")
            FigureCanvasAgg(figure)
            axes = figure.subplots()
            paint(axes, rows)
            axes.invert_yaxis()
            axes.grid(axis="x", alpha=0.3)
            axes.set_title(f"{axes.get_title()} ({where})", fontsize=10)
            figure.savefig(folder / f"{stamp}_{name}.png")
        except Exception as error:
            problems.append(f"{name}: {type(error).__name__}: {error}")
    return problems


def table(record: Mapping[str, Any], part: str, key: str) -> Rows:
    """Rows of a table of a part; none where the part did not come that far."""
    found: Rows = record["parts"].get(part, {}).get("tables", {}).get(key, {}).get("rows", [])
    return found


def _steps(record: Mapping[str, Any]) -> Rows:
    return [row for size in _SIZES for row in table(record, f"steps-{size}", "steps")]


def _kernels(record: Mapping[str, Any]) -> Rows:
    tables = record["parts"].get("bandwidth", {}).get("tables", {})
    judged = [content["rows"] for key, content in tables.items() if content["shown"] and key != "copy"]
    ours = ("triton", "native", "fastest")
    return [row for rows in judged[:1] for row in rows if row["provider"] in ours]


def _paint_mfu(axes: Any, rows: Rows) -> None:
    labels = [f"{row['model']}: {row['variant']}" for row in rows]
    axes.barh(labels, _values(rows, "MFU, measured peak"), color="#1f77b4", label="of the measured peak")
    axes.barh(
        labels, _values(rows, "MFU, data sheet"), color="#aec7e8", height=0.4, label="of the data sheet"
    )
    axes.set(xlim=(0, 1), title="share of the bf16 peak, a plain pretraining step")
    axes.legend(fontsize=8)


def _paint_split(axes: Any, rows: Rows) -> None:
    labels = [f"{row['model']}: {row['variant']}" for row in rows]
    left = [0.0] * len(rows)
    for part, color in _SPLIT.items():
        values = _values(rows, part)
        axes.barh(labels, values, left=left, color=color, label=part.partition(",")[0])
        left = [a + b for a, b in zip(left, values, strict=True)]
    axes.plot(_values(rows, "floor, ms"), labels, "k|", ms=14, label="floor")
    axes.set(title="milliseconds of a plain pretraining step", xlabel="ms")
    axes.legend(fontsize=8)


def _paint_kernels(axes: Any, rows: Rows) -> None:
    labels = [f"{row['operator']}, {row['direction']}: {row['provider']}" for row in rows]
    axes.barh(labels, _values(rows, "share of copy bandwidth"), color="#2ca02c")
    axes.axvline(1.0, color="black", lw=1)
    axes.axvline(0.85, color="grey", ls="--", lw=1)
    axes.set(title="kernels: share of the measured copy bandwidth")


def _paint_peers(axes: Any, rows: Rows) -> None:
    labels = [row["program"] for row in rows]
    bars = axes.barh(labels, _values(rows, "images/s"), color="#9467bd")
    axes.bar_label(bars, fmt="{:,.0f}", fontsize=8)
    axes.margins(x=0.1)
    axes.set(title="images/s of a plain pretraining step, ViT-B/16, bf16")


def _values(rows: Rows, column: str) -> list[float]:
    return [row[column] or 0.0 for row in rows]


_PICTURES: dict[str, tuple[Callable[[Mapping[str, Any]], Rows], Callable[[Any, Rows], None]]] = {
    "mfu": (_steps, _paint_mfu),
    "steps": (_steps, _paint_split),
    "kernels": (_kernels, _paint_kernels),
    "peers": (lambda record: table(record, "peers", "peers"), _paint_peers),
}
