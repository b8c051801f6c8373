"""The mask picture: where the masking network looks in some images, and what the autoencoder fills in."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mlomae.run_dir import write_atomically

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Kind = TypeVar("Kind", bound=np.generic)

COLUMNS = ("input", "removal probability", "masked", "reconstruction")
CELL = 160  # longer side of an image on the page in pixels; less where the file would get too large
MAX_BYTES = 400_000
GREY, STRIPE = 166, 150  # of a removed patch; the stripes tell it from a grey part of the image
MARGIN, GAP, HEAD, FOOT = 24, 10, 72, 50  # of the page in pixels
_COLORS = colormaps["viridis"]
_DPI = 100


def mask_picture(
    path: Path,
    images: Tensor,
    probability: Tensor,
    mask: Tensor,
    reconstruction: Tensor,
    grid: tuple[int, int],
    title: str,
    frequency: Tensor | None = None,
) -> None:
    """Writes a PNG with one row per image: input, removal probability, masked, reconstruction.

    The last column shows the pixels of the kept patches and ``reconstruction`` in the removed ones.

    Args:
        path: the file, replaced in one step.
        images: [N, C, H, W] in [0, 1], C = 1 or 3.
        probability: [N, L], of removing each patch.
        mask: [N, L], 0 where kept and 1 where removed.
        reconstruction: [N, C, H, W] in [0, 1].
        grid: (rows, columns) of patches, rows * columns = L.
        title: one line above the columns.
        frequency: [L], how often each position is removed; adds a row.
    """
    inputs = _pixels(images)
    maps = _floats(probability).reshape(-1, *grid)
    removed = _floats(mask).reshape(-1, *grid) > 0.5
    often = None if frequency is None else _floats(frequency).reshape(grid)
    hidden = np.stack([_enlarge(row, inputs.shape[1:3]) for row in removed])
    composed = np.where(hidden[..., None], _pixels(reconstruction), inputs)
    cell = CELL
    while True:
        png = _draw(cell, inputs, maps, removed, composed, title, often)
        if len(png) <= MAX_BYTES or cell < CELL // 3:
            break
        cell = cell * 4 // 5
    write_atomically(path, png)


def _draw(
    cell: int, inputs: Bytes, maps: Floats, removed: Bools, composed: Bytes, title: str, often: Floats | None
) -> bytes:
    """The whole picture as PNG; no image is longer than ``cell``."""
    size = _display_size(inputs.shape[1:3], cell)
    low, high = _bounds(maps)
    page = _Page(len(inputs) + (often is not None), size)
    # The second bound lets a long title fit on the narrowest page.
    page.text(MARGIN, 24, title, fontsize=min(12.5, 720 / max(len(title), 1)), ha="left", weight="bold")
    for column, name in enumerate(COLUMNS):
        page.text(page.center(column), HEAD - 14, name)
    for row, (image, chances, gone, filled) in enumerate(zip(inputs, maps, removed, composed, strict=True)):
        shown = _resize(image, size)
        page.place(row, 0, shown)
        page.place(row, 1, _colored(chances, low, high, size))
        page.place(row, 2, np.where(_enlarge(gone, size)[..., None], _stripes(size), shown))
        page.place(row, 3, _resize(filled, size))
    if often is not None:
        # On a range of its own: it would hide how the probabilities differ while they are still alike.
        least, most = _bounds(often)
        page.place(len(inputs), 1, _colored(often, least, most, size))
        note = f"how often each\nposition is removed\n(colours: {least:.3g} to {most:.3g})"
        page.text(page.center(0), page.top(len(inputs)) + size[0] / 2, note, fontsize=9)
    _add_legend(page, low, high)
    return page.png()


def _add_legend(page: _Page, low: float, high: float) -> None:
    top, swatch = page.bottom + 4, 14
    left, width = page.left(1), page.size[1]
    ramp = np.tile(np.linspace(0, 1, width, dtype=np.float32), (swatch, 1))
    page.paint(top, left, _colored(ramp, 0, 1, ramp.shape))
    for share in (0.0, 0.5, 1.0):
        page.text(left + share * width, top + 24, f"{low + share * (high - low):.3g}", fontsize=8.5)
    page.paint(top, page.center(2) - 40, _stripes((swatch, swatch)))
    page.text(page.center(2) - 40 + swatch + 6, top + swatch / 2, "removed", ha="left", fontsize=8.5)
    page.text(page.center(3), top + swatch / 2, "kept patches as in input", fontsize=8.5)


class _Page:
    """A white page with four columns of equally large cells; positions in pixels from the top left."""

    def __init__(self, num_rows: int, size: tuple[int, int]) -> None:
        self.size = size
        self._pitch = max(size[1], 150) + GAP  # the column titles need this much above narrow images
        self.bottom = HEAD + num_rows * (size[0] + GAP)
        self._pixels = np.full((self.bottom + FOOT, 2 * MARGIN + 4 * self._pitch - GAP, 3), 255, np.uint8)
        self._texts: list[tuple[float, float, str, dict[str, Any]]] = []

    def top(self, row: int) -> int:
        return HEAD + row * (self.size[0] + GAP)

    def left(self, column: int) -> int:
        return MARGIN + column * self._pitch + (self._pitch - GAP - self.size[1]) // 2

    def center(self, column: int) -> int:
        return self.left(column) + self.size[1] // 2

    def place(self, row: int, column: int, cell: Bytes) -> None:
        self.paint(self.top(row), self.left(column), cell)

    def paint(self, top: int, left: int, pixels: Bytes) -> None:
        self._pixels[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels

    def text(self, x: float, y: float, text: str, **style: Any) -> None:
        self._texts.append((x, y, text, style))

    def png(self) -> bytes:
        height, width = self._pixels.shape[:2]
        figure = Figure(figsize=(width / _DPI, height / _DPI), dpi=_DPI)
        canvas = FigureCanvasAgg(figure)
        figure.figimage(self._pixels, origin="upper")
        style: dict[str, Any] = {"ha": "center", "va": "center", "color": "#222222", "fontsize": 10}
        for x, y, text, changes in self._texts:
            figure.text(x / width, 1 - y / height, text, **(style | changes))
        pixels, size = canvas.print_to_buffer()  # type: ignore[no-untyped-call] # none in matplotlib
        file = io.BytesIO()
        Image.frombuffer("RGBA", size, pixels).convert("RGB").save(file, "PNG", optimize=True)
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


def _colored(values: Floats, low: float, high: float, size: tuple[int, int]) -> Bytes:
    return _enlarge(_COLORS((values - low) / (high - low), bytes=True)[..., :3], size)


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
