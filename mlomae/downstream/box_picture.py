"""The picture of a detector: what it finds in some images, beside what is there."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from numpy.typing import NDArray
from PIL import Image

from mlomae.downstream.average_precision import Found
from mlomae.run_dir import write_atomically

COLUMNS = 3
CELL = 380  # width of an image on the page, in pixels
LABEL = 13  # height of a label, in pixels of the page
SHOWN = 0.5  # score from which a box is drawn
MARGIN, GAP, HEAD, LINE = 16, 10, 40, 22  # of the page in pixels; a line of the legend
_DPI = 100
_COLOURS = colormaps["tab10"].colors  # type: ignore[attr-defined]
_TRUE: dict[str, Any] = {"edgecolor": "black", "linewidth": 0.9, "linestyle": (0, (3, 2)), "fill": False}
_HALO: dict[str, Any] = {"edgecolor": "white", "linewidth": 1.7, "fill": False}


@dataclass(frozen=True)
class Panel:
    """One image.

    Attributes:
        pixels: uint8 [H, W, C], C = 1 or 3.
        found: in it.
        boxes: float32 [n, 4], what is there.
    """

    pixels: NDArray[np.uint8]
    found: Found
    boxes: NDArray[np.float32]


def box_picture(path: Path, panels: Sequence[Panel], categories: Sequence[str], title: str) -> None:
    """Writes a PNG, replaced in one step: found boxes solid with their score, true ones dashed.

    Args:
        categories: names of the classes 1, 2, …; a class has one of ten colours.
        title: above the images; the score from which boxes are shown is added to it.
    """
    columns = min(COLUMNS, len(panels))
    rows = math.ceil(len(panels) / columns)
    # All cells have the shape of the tallest image: the others leave a gap below.
    height = round(CELL * max(panel.pixels.shape[0] / panel.pixels.shape[1] for panel in panels))
    height = min(height, 2 * CELL)
    width = 2 * MARGIN + columns * (CELL + GAP) - GAP
    shown = sorted({int(label) for panel in panels for label in _sure(panel.found).labels})
    legend = _legend(shown, categories)
    per_line = max(1, (width - 2 * MARGIN) // 150)
    lines = math.ceil(len(legend) / per_line)
    total = HEAD + rows * (height + GAP) + lines * LINE + MARGIN
    figure = Figure(figsize=(width / _DPI, total / _DPI), dpi=_DPI, facecolor="white")
    title = f"{title}; found with a score of {SHOWN} or more"
    figure.text(
        MARGIN / width, 1 - 22 / total, title, fontsize=11, weight="bold", va="center", color="#222222"
    )
    for number, panel in enumerate(panels):
        row, column = divmod(number, columns)
        left, top = MARGIN + column * (CELL + GAP), HEAD + row * (height + GAP)
        place = (left / width, 1 - (top + height) / total, CELL / width, height / total)
        _draw(figure.add_axes(place), panel)
    figure.legend(
        handles=legend, loc="lower center", ncols=per_line, frameon=False, fontsize=9,
        bbox_to_anchor=(0.5, 2 / total), borderaxespad=0.2, handlelength=2.4,
    )  # fmt: skip
    write_atomically(path, _png(figure))


def _draw(axes: Axes, panel: Panel) -> None:
    axes.imshow(panel.pixels.squeeze(), cmap="gray", vmin=0, vmax=255, interpolation="antialiased")
    axes.set_axis_off()
    axes.set_anchor("N")
    for box in panel.boxes:
        for style in (_HALO, _TRUE):
            axes.add_patch(_rectangle(box, **style, zorder=3))
    least = panel.pixels.shape[1] * LABEL / CELL  # of a label's lower edge: the image holds all of it
    # The surest last: its label lies on top.
    sure = _sure(panel.found)
    for number, order in enumerate(np.argsort(sure.scores)):
        box, colour = sure.boxes[order], _colour(int(sure.labels[order]))
        axes.add_patch(_rectangle(box, edgecolor=colour, linewidth=1.8, fill=False, zorder=2))
        axes.text(
            box[0], max(box[1], least), f"{sure.scores[order]:.2f}",
            fontsize=6.5, color="white", va="bottom", ha="left", zorder=4 + number, clip_on=True,
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 0.8},
        )  # fmt: skip


def _sure(found: Found) -> Found:
    kept = found.scores >= SHOWN
    return Found(found.index, found.boxes[kept], found.scores[kept], found.labels[kept])


def _rectangle(box: NDArray[np.float32], **style: Any) -> Rectangle:
    left, top, right, bottom = box.tolist()
    return Rectangle((left, top), right - left, bottom - top, **style)


def _colour(label: int) -> Any:
    return _COLOURS[(label - 1) % len(_COLOURS)]


def _legend(labels: Sequence[int], categories: Sequence[str]) -> list[Line2D]:
    found = [
        Line2D([], [], color=_colour(label), linewidth=2.4, label=f"{categories[label - 1]} found")
        for label in labels
    ]
    return [*found, Line2D([], [], color="black", linewidth=1.1, linestyle=(0, (3, 2)), label="true box")]


def _png(figure: Figure) -> bytes:
    pixels, size = FigureCanvasAgg(figure).print_to_buffer()  # type: ignore[no-untyped-call] # none in matplotlib
    file = io.BytesIO()
    Image.frombuffer("RGBA", size, pixels).convert("RGB").save(file, "PNG", optimize=True)
    return file.getvalue()
