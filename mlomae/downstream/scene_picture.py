"""The picture of a segmentation: images, their true classes and those that were predicted."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from mlomae.data.dataset import VOID
from mlomae.run_dir import write_atomically

COLUMNS = ("image", "truth", "prediction")
STRENGTH = 0.65  # of the class colours over the image
VOID_COLOUR = "#ebebeb"
MAX_LEGEND = 23  # classes that are named: those with most pixels
LEGEND_COLUMNS = 6
_WIDTH = 3.2  # of an image on the page, in inches
_DPI = 110
_GOLDEN = 0.618034

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Scene:
    """An image [C, H, W] with its true and predicted classes [H, W]; all uint8."""

    image: Tensor
    truth: Tensor
    predicted: Tensor


def scene_picture(path: Path, scenes: Sequence[Scene], names: Sequence[str], title: str) -> None:
    """Writes a PNG with one row per scene and a legend.

    Where the truth is VOID, both maps are nearly white.

    Args:
        path: the file, replaced in one step.
        names: of all classes.
        title: one line above the columns.
    """
    colours = class_colours(len(names))
    aspect = max((scene.truth.shape[0] / scene.truth.shape[1] for scene in scenes), default=1.0)
    present = _present(scenes, len(names))
    legend = -(-(len(present) + 1) // LEGEND_COLUMNS) * 0.26 + 0.2
    height = 0.75 + max(len(scenes), 1) * (_WIDTH * aspect + 0.08) + legend
    width = len(COLUMNS) * (_WIDTH + 0.08) + 0.2
    figure = Figure(figsize=(width, height), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        max(len(scenes), 1), len(COLUMNS), left=0.1 / width, right=1 - 0.1 / width,
        bottom=legend / height, top=1 - 0.7 / height, wspace=0.02, hspace=0.03,
    )  # fmt: skip
    for row, scene in enumerate(scenes):
        for column, (name, pixels) in enumerate(zip(COLUMNS, _cells(scene, colours), strict=True)):
            axes = figure.add_subplot(grid[row, column])
            axes.imshow(pixels, aspect="auto")
            axes.set_axis_off()
            if row == 0:
                axes.set_title(name, fontsize=10, pad=4)
    figure.text(0.1 / width, 1 - 0.24 / height, title, fontsize=12, weight="bold", va="center")
    handles = [Patch(color=colours[number] / 255, label=names[number]) for number in present]
    handles.append(Patch(facecolor=VOID_COLOUR, edgecolor="grey", label="not counted"))
    figure.legend(handles=handles, loc="lower center", ncol=LEGEND_COLUMNS, fontsize=9, frameon=False)
    content = io.BytesIO()
    canvas.print_png(content)  # type: ignore[no-untyped-call] # none in matplotlib
    write_atomically(path, content.getvalue())


def class_colours(count: int) -> Bytes:
    """[count, 3]: a qualitative palette for few classes, hues by the golden section for many."""
    if count <= 20:
        table = colormaps["tab20"]
        # Strong colours first, then their pale twins, then the greys, which VOID resembles.
        order = [*range(0, 14, 2), 16, 18, *range(1, 14, 2), 17, 19, 14, 15][:count]
        return np.asarray([table(number, bytes=True)[:3] for number in order], np.uint8)
    numbers = np.arange(count)
    hues = numbers * _GOLDEN % 1
    return np.asarray(colormaps["hsv"](hues, bytes=True))[:, :3] // (1 + numbers[:, None] % 2).astype(
        np.uint8
    )


def _cells(scene: Scene, colours: Bytes) -> tuple[Bytes, Bytes, Bytes]:
    """What stands in a row, each uint8 [H, W, 3]."""
    image: Bytes = np.broadcast_to(scene.image.permute(1, 2, 0).numpy(), (*scene.truth.shape, 3))
    counted = (scene.truth != VOID).numpy()
    grey = image.mean(axis=2, keepdims=True)
    faded = (1 - STRENGTH) * grey + STRENGTH * 255 * np.asarray(to_rgb(VOID_COLOUR))

    def overlay(classes: Tensor) -> Bytes:
        painted = (1 - STRENGTH) * grey + STRENGTH * colours[np.where(counted, classes.numpy(), 0)]
        return np.where(counted[..., None], painted, faded).astype(np.uint8)

    return image, overlay(scene.truth), overlay(scene.predicted)


def _present(scenes: Sequence[Scene], num_classes: int) -> list[int]:
    """The classes that occur, as many as are named, ascending."""
    counts = np.zeros(VOID + 1, np.int64)
    for scene in scenes:
        for part in (scene.truth, scene.predicted):
            counts += np.bincount(part.flatten().numpy(), minlength=VOID + 1)
    most = np.argsort(-counts[:num_classes], kind="stable")[:MAX_LEGEND]
    return sorted(int(number) for number in most if counts[number])
