"""The timeline of one outer iteration as a picture: its parts above, below them operators by kind."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch, Patch

from mlomae.profile_trace import BETWEEN, OTHER, REST, Piece, Reading
from mlomae.profiling import Profile

# Levels by hue: pretrain blue, hypergradient green, head and mask warm, everything else grey.
_PARTS = {
    "data": "#8c8c8c",
    "mask selection": "#c6b8dc",
    "pretrain forward": "#9ecae1",
    "pretrain backward": "#5ba3cf",
    "pretrain optimizer": "#1f5f9e",
    "direction": "#5fb870",
    "influence": "#addda3",
    "head step": "#f16913",
    "mask step": "#de77ae",
    REST: "#e0e0e0",
}
_KINDS = {
    "matrix products": "#4a7fc1",
    "attention": "#e8913f",
    "normalisation": "#57ad57",
    "activation": "#d65a6a",
    "patch operators": "#9575c4",
    "generated code": "#3fa9a9",
    "optimizer": "#7a4f3a",
    "copies": "#d1b53f",
    OTHER: "#bdbdbd",
}
_DARK = (_PARTS["pretrain optimizer"], _KINDS["optimizer"])
_ZOOM = "pretrain forward"
_DEPTH = 3
"""Lanes of operators in the enlarged part: those that the program calls, and two levels inside them."""
# Of the width: neighbours of one colour with a smaller gap are drawn as one; a letter.
_GAP, _LETTER = 1 / 3000, 1 / 195
_LINES = 3

_Span = tuple[int, int, str, str]
"""Start and end in ns, name, and the key of its colour."""


@dataclass(frozen=True)
class _Lane:
    label: str
    spans: list[_Span]
    colors: dict[str, str]


def draw(result: Profile) -> bytes:
    """A PNG of the first profiled iteration, and of its longest pretrain forward pass enlarged."""
    reading = result.reading
    window = _window(reading)
    upper = _lanes(reading, window, depth=1)
    enlarged = _longest_forward(upper[-1 if reading.device else 0], window)
    lower = [lane for lane in _lanes(reading, enlarged, depth=_DEPTH) if lane.colors is _KINDS]
    figure = Figure(figsize=(14, 1.9 + 0.5 * (len(upper) + len(lower))), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, height_ratios=[len(upper), len(lower)])
    _draw_lanes(top, upper, window)
    _draw_lanes(bottom, lower, enlarged)
    # Between the two timelines is room for the lines alone.
    top.xaxis.tick_top()
    top.spines["top"].set_visible(True)
    top.spines["bottom"].set_visible(False)
    title = f"outer iteration {result.first} on {result.device}"
    top.set_title(title + (f", and one {_ZOOM} enlarged; ms" if enlarged != window else "; ms"), fontsize=11)
    _connect(top, bottom, window, enlarged)
    _legend(top, _PARTS, upper)
    _legend(bottom, _KINDS, [*upper, *lower])
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()


def _longest_forward(parts: _Lane, window: tuple[int, int]) -> tuple[int, int]:
    """ns: a pretrain forward pass; the whole window where there is none."""
    found = [(start, end) for start, end, part, _ in _merged(parts.spans, window) if part == _ZOOM]
    return max(found, key=lambda span: span[1] - span[0], default=window)


def _window(reading: Reading) -> tuple[int, int]:
    """ns: the first iteration, to the end of the last kernel that it launched."""
    start, end = reading.iterations[0]
    return start, max([end, *(piece.end for piece in reading.device if piece.launched < end)])


def _lanes(reading: Reading, window: tuple[int, int], depth: int) -> list[_Lane]:
    """From top to bottom: parts and operators of the host, then those of the GPU and its parts."""
    lanes = [_Lane("parts", list(_part_spans(reading)), _PARTS)]
    for level in range(depth):
        label = "operators" if level == 0 else f"level {level + 1}"
        called = (piece for piece in reading.host if piece.lane == level and piece.kind != BETWEEN)
        lanes.append(_Lane(label, _kind_spans(called), _KINDS))
    for stream in sorted({piece.lane for piece in reading.device}):
        running = (piece for piece in reading.device if piece.lane == stream)
        lanes.append(_Lane(f"GPU stream {stream}", _kind_spans(running), _KINDS))
    if reading.device:
        # What is left of a kernel when those that began before it have ended.
        spans = [(piece.end - piece.own, piece.end, piece.part, piece.part) for piece in reading.device]
        lanes.append(_Lane("parts on the GPU", spans, _PARTS))
    cut = [_Lane(lane.label, list(_cut(lane.spans, window)), lane.colors) for lane in lanes]
    return [lane for lane in cut if lane.spans]


def _part_spans(reading: Reading) -> Iterator[_Span]:
    for (start, part), (end, _) in zip(reading.changes, reading.changes[1:], strict=False):
        if part is not None:
            yield start, end, part, part


def _kind_spans(pieces: Iterable[Piece]) -> list[_Span]:
    return sorted(
        (piece.start, piece.end, piece.name.removeprefix("void ").rpartition("::")[2], piece.kind)
        for piece in pieces
    )


def _cut(spans: Iterable[_Span], window: tuple[int, int]) -> Iterator[_Span]:
    for start, end, name, key in spans:
        start, end = max(start, window[0]), min(end, window[1])
        if start < end:
            yield start, end, name, key


def _merged(spans: Iterable[_Span], window: tuple[int, int]) -> list[_Span]:
    """Neighbours of one colour become one, by the name of the colour if their own differ."""
    gap = _GAP * (window[1] - window[0])
    merged: list[_Span] = []
    for start, end, name, key in spans:
        last = merged[-1] if merged else None
        if last is not None and last[3] == key and start - last[1] < gap:
            merged[-1] = (last[0], max(end, last[1]), name if name == last[2] else key, key)
        else:
            merged.append((start, end, name, key))
    return merged


def _draw_lanes(axes: Axes, lanes: list[_Lane], window: tuple[int, int]) -> None:
    whole = window[1] - window[0]
    for row, lane in enumerate(lanes):
        spans = _merged(lane.spans, window)
        bars = [(1e-6 * (start - window[0]), 1e-6 * (end - start)) for start, end, _, _ in spans]
        colors = [lane.colors[key] for *_, key in spans]
        axes.broken_barh(bars, (row - 0.42, 0.84), facecolors=colors, linewidth=0)
        for (left, width), (start, end, name, key) in zip(bars, spans, strict=True):
            label = _label(name, room=int((end - start) / whole / _LETTER))
            shade = "white" if lane.colors[key] in _DARK else "black"
            axes.text(left + width / 2, row, label, ha="center", va="center", fontsize=7.5, color=shade)
    axes.set(xlim=(0, 1e-6 * whole), ylim=(len(lanes) - 0.5, -0.5))
    axes.set_yticks(range(len(lanes)), [lane.label for lane in lanes])
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)


def _label(name: str, room: int) -> str:
    """The name in as few lines as it takes; nothing where it does not fit.

    Args:
        room: letters in a line.
    """
    lines = textwrap.wrap(name.replace("_", " ").strip(), max(room, 1), break_long_words=False)
    return "\n".join(lines) if len(lines) <= _LINES and max(map(len, lines)) <= room else ""


def _connect(top: Axes, bottom: Axes, window: tuple[int, int], enlarged: tuple[int, int]) -> None:
    """Lines from the enlarged part of the upper timeline to the ends of the lower one."""
    for time, side in zip(enlarged, (0, 1), strict=True):
        x = 1e-6 * (time - window[0])
        line = ConnectionPatch(
            (x, 0), (side, 1), top.get_xaxis_transform(), bottom.transAxes, color="#606060", lw=0.8, ls=":"
        )
        line.set_in_layout(False)
        top.figure.add_artist(line)


def _legend(axes: Axes, colors: dict[str, str], lanes: list[_Lane]) -> None:
    used = {key for lane in lanes if lane.colors is colors for *_, key in lane.spans}
    patches = [Patch(color=color, label=name) for name, color in colors.items() if name in used]
    axes.legend(handles=patches, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)
