"""The mask picture: where the masking network looks in some images, and what the autoencoder fills in."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Colormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mlomae.preview import Preview
from mlomae.run_dir import write_atomically

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Kind = TypeVar("Kind", bound=np.generic)

COLUMNS = ("input", "removal probability", "influence", "masked", "reconstruction")
CELL = 160  # longer side of an image on the page in pixels; less where the file would get too large
MAX_BYTES = 400_000
GREY, STRIPE = 166, 150  # of a removed patch; the stripes tell it from a grey part of the image
MARGIN, GAP, HEAD, FOOT = 24, 10, 72, 56  # of the page in pixels
SWATCH = 14  # side of the legend's samples
_COLORS, _DIVERGING = colormaps["viridis"], colormaps["RdBu_r"]
_DPI = 100


def mask_picture(
    path: Path,
    preview: Preview,
    title: str,
    frequency: Tensor | None = None,
    influence: Tensor | None = None,
) -> None:
    """Writes a PNG with one row per image: input, removal probability, masked, reconstruction.

    The last column shows the pixels of the kept patches and the reconstruction of the removed ones.

    Args:
        path: the file, replaced in one step.
        title: one line above the columns.
        frequency: [L], how often each position is removed; adds a row.
        influence: [N, L], of the removed patches; adds a column.
    """
    png, cell = _Drawing(preview, title, frequency, influence), CELL
    while len(content := png.draw(cell)) > MAX_BYTES and cell >= CELL // 3:
        cell = cell * 4 // 5
    write_atomically(path, content)


class _Drawing:
    """What is on the page, at the sizes of the images; see ``mask_picture``."""

    def __init__(
        self, preview: Preview, title: str, frequency: Tensor | None, influence: Tensor | None
    ) -> None:
        grid = preview.grid
        self.title = title
        self.inputs = _pixels(preview.images)
        self.maps = _floats(preview.probability).reshape(-1, *grid)
        self.removed = _floats(preview.mask).reshape(-1, *grid) > 0.5
        self.often = None if frequency is None else _floats(frequency).reshape(grid)
        self.influence = None if influence is None else _floats(influence).reshape(-1, *grid)
        hidden = np.stack([_enlarge(row, self.inputs.shape[1:3]) for row in self.removed])
        self.composed = np.where(hidden[..., None], _pixels(preview.reconstruction), self.inputs)

    def draw(self, cell: int) -> bytes:
        """The whole picture as PNG; no image is longer than ``cell``."""
        size = _display_size(self.inputs.shape[1:3], cell)
        columns = [name for name in COLUMNS if name != "influence" or self.influence is not None]
        page = _Page(columns, len(self.inputs) + (self.often is not None), size)
        # The second bound lets a long title fit on the narrowest page.
        title_size = min(12.5, 720 / max(len(self.title), 1))
        page.text(MARGIN, 24, self.title, fontsize=title_size, ha="left", weight="bold")
        for name in columns:
            page.text(page.center(name), HEAD - 14, name)
        low, high = _bounds(self.maps)
        for row, image in enumerate(self.inputs):
            shown, gone = _resize(image, size), _enlarge(self.removed[row], size)[..., None]
            page.place(row, "input", shown)
            page.place(row, "removal probability", _colored(self.maps[row], low, high, size))
            page.place(row, "masked", np.where(gone, _stripes(size), shown))
            page.place(row, "reconstruction", _resize(self.composed[row], size))
        _add_ramp(page, "removal probability", (low, high), _COLORS)
        page.paint(page.bottom + 4, page.center("masked") - 40, _stripes((SWATCH, SWATCH)))
        page.note("masked", "removed", ha="left", dx=SWATCH + 6 - 40)
        page.note("reconstruction", "kept patches as in input")
        self._add_frequency(page)
        self._add_influence(page)
        return page.png()

    def _add_frequency(self, page: _Page) -> None:
        if self.often is None:
            return
        # On a range of its own: it would hide how the probabilities differ while they are still alike.
        least, most = _bounds(self.often)
        row = len(self.inputs)
        page.place(row, "removal probability", _colored(self.often, least, most, page.size))
        note = f"how often each\nposition is removed\n(colours: {least:.3g} to {most:.3g})"
        page.text(page.center("input"), page.top(row) + page.size[0] / 2, note, fontsize=9)

    def _add_influence(self, page: _Page) -> None:
        """On a faint image, red where weighing a patch more would help the task, blue where it would harm."""
        if self.influence is None:
            return
        values = np.where(self.removed, self.influence, 0)
        # A few patches may be far above all others: they take the last colour, and the others still differ.
        most = float(np.quantile(np.abs(values), 0.98)) or 1.0
        for row, image in enumerate(self.inputs):
            faint = (_resize(image, page.size).mean(axis=2, keepdims=True) * 0.25 + 180).astype(np.uint8)
            colours = _colored(values[row], -most, most, page.size, _DIVERGING)
            gone = _enlarge(self.removed[row], page.size)[..., None]
            page.place(row, "influence", np.where(gone, colours, np.broadcast_to(faint, colours.shape)))
        _add_ramp(page, "influence", (-most, most), _DIVERGING)
        page.text(
            page.center("influence"), page.bottom + 42, "less helps · more helps the task", fontsize=8.5
        )


def _add_ramp(page: _Page, column: str, bounds: tuple[float, float], colours: Colormap) -> None:
    top, left, width = page.bottom + 4, page.left(column), page.size[1]
    ramp = np.tile(np.linspace(0, 1, width, dtype=np.float32), (SWATCH, 1))
    page.paint(top, left, _colored(ramp, 0, 1, ramp.shape, colours))
    for share, side in ((0.0, "left"), (0.5, "center"), (1.0, "right")):
        value = bounds[0] + share * (bounds[1] - bounds[0])
        page.text(left + share * width, top + 24, f"{value:.2g}", ha=side, fontsize=8.5)


class _Page:
    """A white page with columns of equally large cells; positions in pixels from the top left."""

    def __init__(self, columns: Sequence[str], num_rows: int, size: tuple[int, int]) -> None:
        self.size = size
        self._columns = {name: number for number, name in enumerate(columns)}
        self._pitch = max(size[1], 150) + GAP  # the column titles need this much above narrow images
        self.bottom = HEAD + num_rows * (size[0] + GAP)
        width = 2 * MARGIN + len(columns) * self._pitch - GAP
        self._pixels = np.full((self.bottom + FOOT, width, 3), 255, np.uint8)
        self._texts: list[tuple[float, float, str, dict[str, Any]]] = []

    def top(self, row: int) -> int:
        return HEAD + row * (self.size[0] + GAP)

    def left(self, column: str) -> int:
        return MARGIN + self._columns[column] * self._pitch + (self._pitch - GAP - self.size[1]) // 2

    def center(self, column: str) -> int:
        return self.left(column) + self.size[1] // 2

    def note(self, column: str, text: str, dx: int = 0, **style: Any) -> None:
        """Small print below a column."""
        self.text(self.center(column) + dx, self.bottom + 4 + SWATCH / 2, text, fontsize=8.5, **style)

    def place(self, row: int, column: str, cell: Bytes) -> None:
        self.paint(self.top(row), self.left(column), cell)

    def paint(self, top: int, left: int, pixels: Bytes) -> None:
        self._pixels[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        self._texts.append((x, y, text, style))

    def png(self) -> bytes:
        height, width = self._pixels.shape[:2]
        # Matplotlib draws the words alone: it takes forty times the bytes of an image to place it (3.11).
        figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI, facecolor="none")
        canvas = FigureCanvasAgg(figure)
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": "#222222", "fontsize": 10}
        for x, y, text, changes in self._texts:
            figure.text(x / width, 1 - y / height, text, **(style | changes))
        canvas.draw()  # type: ignore[no-untyped-call] # none in matplotlib
        words = Image.fromarray(np.asarray(canvas.buffer_rgba()))  # type: ignore[no-untyped-call]
        page = Image.fromarray(self._pixels)
        page.paste(words, mask=words)
        file = io.BytesIO()
        page.save(file, "PNG", optimize=True)
        return file.getvalue()


def _floats(tensor: Tensor) -> Floats:
    return tensor.detach().float().cpu().numpy()


def _pixels(images: Tensor) -> Bytes:
    """[N, C, H, W] in [0, 1] → [N, H, W, 3] in 0 … 255."""
    pixels = (_floats(images).clip(0, 1) * 255).round().astype(np.uint8)
    return np.broadcast_to(pixels, (len(pixels), 3, *pixels.shape[2:])).transpose(0, 2, 3, 1)


def _display_size(size: tuple[int, int], cell: int) -> tuple[int, int]:
    """Small images grow by a whole factor, so that every pixel stays a square; large ones shrink."""
    longer = max(size)
    scale = cell // longer if longer <= cell else cell / longer
    return round(size[0] * scale), round(size[1] * scale)


def _resize(image: Bytes, size: tuple[int, int]) -> Bytes:
    if size[0] >= image.shape[0]:
        return _enlarge(image, size)
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.LANCZOS))


def _enlarge(cells: NDArray[Kind], size: tuple[int, int]) -> NDArray[Kind]:
    """Nearest-neighbour enlargement of [rows, columns, …] to ``size``."""
    rows = np.arange(size[0]) * cells.shape[0] // size[0]
    columns = np.arange(size[1]) * cells.shape[1] // size[1]
    enlarged: NDArray[Kind] = cells[rows[:, None], columns[None, :]]
    return enlarged


def _colored(
    values: Floats, low: float, high: float, size: tuple[int, int], colours: Colormap = _COLORS
) -> Bytes:
    return _enlarge(colours((values - low) / (high - low), bytes=True)[..., :3], size)


def _stripes(size: tuple[int, int]) -> Bytes:
    """Grey with diagonal stripes, [H, W, 1]."""
    diagonal = np.add.outer(np.arange(size[0]), np.arange(size[1]))
    return np.where(diagonal % 8 < 2, STRIPE, GREY).astype(np.uint8)[..., None]


def _bounds(values: Floats) -> tuple[float, float]:
    """A range in steps of 0.05 that holds all values and is not so narrow that it shows mere noise."""
    low, high = math.floor(values.min() * 20), math.ceil(min(values.max(), 1) * 20)
    while high - low < 4:
        low, high = max(low - 1, 0), min(high + 1, 20)
    return low / 20, high / 20
