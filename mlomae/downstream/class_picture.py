"""The picture of a classification: test images with the class that was predicted and the one that is true."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from mlomae.run_dir import write_atomically

COLUMNS = 6
RIGHT, WRONG = "#1a7f37", "#c62828"
MAX_NAME = 24  # letters of a class name; the rest is left out
_CELL, _TEXT = 1.75, 0.5  # side of an image and height of the text below it, in inches
_HEAD, _MARGIN, _GAP = 0.55, 0.15, 0.15
_DPI = 110
_SMALL = 64  # pixels of a side, below which an image is shown with its pixels as squares


@dataclass(frozen=True)
class Guess:
    """An image and what is said of it.

    Attributes:
        image: uint8 [C, H, W].
        predicted, truth: class numbers.
        confidence: probability of the predicted class.
    """

    image: Tensor
    predicted: int
    truth: int
    confidence: float


def class_picture(path: Path, guesses: Sequence[Guess], names: Sequence[str], title: str) -> None:
    """Writes a PNG with a grid of images; a wrong one has a red frame and both classes below it.

    Args:
        path: the file, replaced in one step.
        names: of all classes.
        title: one line above the grid.
    """
    rows = -(-len(guesses) // COLUMNS)
    width = 2 * _MARGIN + COLUMNS * (_CELL + _GAP) - _GAP
    height = _HEAD + rows * (_CELL + _TEXT) + _MARGIN
    figure = Figure(figsize=(width, height), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    figure.text(_MARGIN / width, 1 - 0.3 / height, title, fontsize=12, weight="bold", va="center")
    for number, guess in enumerate(guesses):
        row, column = divmod(number, COLUMNS)
        left, bottom = _MARGIN + column * (_CELL + _GAP), height - _HEAD - row * (_CELL + _TEXT) - _CELL
        axes = figure.add_axes((left / width, bottom / height, _CELL / width, _CELL / height))
        _place(axes, guess, names)
    content = io.BytesIO()
    canvas.print_png(content)  # type: ignore[no-untyped-call] # none in matplotlib
    write_atomically(path, content.getvalue())


def _place(axes: object, guess: Guess, names: Sequence[str]) -> None:
    from matplotlib.axes import Axes

    assert isinstance(axes, Axes)
    right = guess.predicted == guess.truth
    pixels = guess.image.permute(1, 2, 0).numpy()
    axes.imshow(
        np.broadcast_to(pixels, (*pixels.shape[:2], 3)),
        interpolation="nearest" if max(pixels.shape[:2]) <= _SMALL else "antialiased",
    )
    axes.set(xticks=[], yticks=[])
    for side in axes.spines.values():
        side.set(color=RIGHT if right else WRONG, linewidth=1 if right else 3)
    text = f"{_short(names[guess.predicted])}  {guess.confidence:.0%}"
    if not right:
        text = f"✗ {text}\nis {_short(names[guess.truth])}"
    axes.set_xlabel(text, fontsize=9, color=RIGHT if right else WRONG, labelpad=3)


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}…"
