"""What the page shows of masks: film, frequencies, influence and reconstructions, as data URIs and words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlomae.report import images
from mlomae.report.figures import Kind, write
from mlomae.report.pictures import Bools, Classes, Film, Floats, Grid, Latest

Limits = tuple[float, float]
Shares = Floats | NDArray[np.float64]

MAX_COLUMNS = 24
MAX_ROWS = 8
MIN_CLASS_IMAGES, MAX_CLASSES = 8, 20


@dataclass(frozen=True)
class Scale:
    """A colour bar: its ends in words, and its colours as a CSS gradient."""

    low: str
    high: str
    ramp: str


@dataclass(frozen=True)
class Cell:
    """A map of patches, and its content in words; ``cover`` hides the removed patches of a photo."""

    map: str
    text: str
    cover: str = ""


@dataclass(frozen=True)
class Strip:
    """Rows: the same images; columns: steps. ``inputs`` are photos of the rows, where they are known."""

    steps: list[int]
    rows: list[list[Cell]]
    inputs: list[str]


@dataclass(frozen=True)
class ClassMap:
    """A class of the held-out sample: its frequencies, how they differ from those of all images.

    Attributes:
        deviation: root mean square of the difference over positions.
        excess: how many times the deviation that so many images have by chance.
    """

    name: str
    count: int
    frequency: Cell
    difference: Cell
    deviation: str
    excess: float


@dataclass(frozen=True)
class Overlay:
    """An image, and what lies over it."""

    photo: str
    cell: Cell


def probability_bounds(films: Sequence[Film]) -> Limits:
    """A range that holds all probabilities of all films, so that equal colours mean equal numbers."""
    return bounds([film.probability for film in films])


def bounds(values: Sequence[Shares]) -> Limits:
    """A range in steps of 0.05 within [0, 1] that holds all values and is 0.1 wide at least."""
    low = math.floor(min(float(part.min()) for part in values) * 20 + 1e-6)
    high = math.ceil(max(float(part.max()) for part in values) * 20 - 1e-6)
    while high - low < 2:
        low, high = max(low - 1, 0), min(high + 1, 20)
    return low / 20, high / 20


def share_scale(low: float, high: float) -> Scale:
    """The colour bar of shares between two bounds."""
    return Scale(_share(low), _share(high), images.sequential_ramp())


def strip(film: Film, latest: Latest | None, limits: Limits) -> Strip:
    """The film as rows of small maps.

    Args:
        latest: of the same run; its photos are taken where it shows the same images.
        limits: of the colours.
    """
    sample = film.sampled(MAX_COLUMNS)
    count = film.probability.shape[1]
    known = latest is not None and len(latest.images) == count
    rows = [
        [
            _film_cell(sample.probability[moment, image], sample.removed[moment, image], film.grid, limits)
            for moment in range(len(sample.steps))
        ]
        for image in range(min(count, MAX_ROWS))
    ]
    inputs = [images.photo(photo) for photo in latest.images[:MAX_ROWS]] if latest and known else []
    return Strip(sample.steps, rows, inputs)


def _film_cell(chances: Floats, removed: Bools, grid: Grid, limits: Limits) -> Cell:
    return Cell(
        images.sequential(chances.reshape(grid), *limits),
        f"{_share(chances.min())} to {_share(chances.max())}",
        images.covering(removed.reshape(grid)),
    )


def frequency_cell(frequency: Shares, grid: Grid, limits: Limits) -> Cell:
    """A map of how often each position is removed."""
    values = np.asarray(frequency, np.float32).reshape(grid)
    most, least = (_place(int(index), grid) for index in (values.argmax(), values.argmin()))
    text = (
        f"most often removed: {most} ({_share(values.max())}); least often: {least} ({_share(values.min())})"
    )
    return Cell(images.sequential(values, *limits), text)


def _place(index: int, grid: Grid) -> str:
    return f"row {index // grid[1] + 1}, column {index % grid[1] + 1}"


def _share(value: np.floating[Any] | float) -> str:
    return write(float(value), Kind.SHARE)


def class_maps(classes: Classes, grid: Grid) -> tuple[list[ClassMap], Scale, Scale] | None:
    """Those with enough images that deviate most from all images together, and the two colour bars.

    How far a class deviates is judged against chance: the mask of each image taken as a draw with the
    frequencies of all images. None where no class has enough images, or where there is one class only.
    """
    enough = np.flatnonzero(classes.count >= MIN_CLASS_IMAGES)
    total = int(classes.count.sum())
    if not len(enough) or np.count_nonzero(classes.count) < 2:
        return None
    mean = (classes.frequency * (classes.count / total)[:, None]).sum(axis=0)
    difference = classes.frequency[enough] - mean
    deviation = np.sqrt((difference**2).mean(axis=1))
    count = classes.count[enough]
    chance = np.sqrt((mean * (1 - mean)).mean() * (1 / count - 1 / total))
    # Without chance, as where all images have one mask, differences are rounding.
    excess = deviation / np.maximum(chance, 1e-6)
    order = np.argsort(-excess, kind="stable")[:MAX_CLASSES]
    limits = bounds([classes.frequency[enough]])
    scale = max(float(np.abs(difference[order]).max()), 0.01)
    maps = [
        ClassMap(
            classes.names[enough[index]],
            int(count[index]),
            frequency_cell(classes.frequency[enough[index]], grid, limits),
            Cell(images.diverging(difference[index].reshape(grid), scale), _extremes(difference[index])),
            _share(deviation[index]),
            float(excess[index]),
        )
        for index in order
    ]
    ends = _share(-scale), f"+{_share(scale)}"
    return maps, share_scale(*limits), Scale(*ends, images.diverging_ramp())


def _extremes(difference: Floats) -> str:
    return f"from {_share(difference.min())} to {_share(difference.max())} against all images"


def influence_overlays(latest: Latest) -> tuple[list[Overlay], Scale] | None:
    """The influence over its images, in removed patches only; None without one."""
    found = latest.influence
    if found is None:
        return None
    values = np.where(found.removed, found.values, np.nan)[:MAX_ROWS]
    sizes = np.abs(values[np.isfinite(values)])
    if not len(sizes):
        return None
    # A few patches with a very large influence would leave all others without colour.
    scale = float(np.quantile(sizes, 0.98)) or float(sizes.max()) or 1.0
    overlays = [
        Overlay(
            images.photo(image),
            Cell(
                images.diverging(row.reshape(latest.grid), scale),
                f"positive in {(row > 0).sum()} of {removed.sum()} removed patches",
                images.covering(~removed.reshape(latest.grid)),
            ),
        )
        for image, row, removed in zip(found.images, values, found.removed, strict=False)
    ]
    return overlays, Scale(write(-scale, digits=2), f"+{write(scale, digits=2)}", images.diverging_ramp())


@dataclass(frozen=True)
class Reconstruction:
    """An image, what hides its removed patches, and what the autoencoder fills in.

    Attributes:
        error: root mean square over the removed pixels, which lie in [0, 1].
    """

    photo: str
    cover: str
    filled: str
    error: str


def reconstructions(latest: Latest) -> list[Reconstruction]:
    """Input, mask and reconstruction of each image; kept patches are those of the input."""
    size = latest.images.shape[1:3]
    shown = []
    for image, predicted, removed in zip(
        latest.images[:MAX_ROWS], latest.reconstruction, latest.removed, strict=False
    ):
        grid = removed.reshape(latest.grid)
        hidden = _enlarged(grid, size)
        filled = np.where(hidden, predicted, image)
        squared = ((predicted.astype(np.float32) - image) / 255) ** 2
        error = float(squared[np.broadcast_to(hidden, squared.shape)].mean()) if hidden.any() else 0.0
        text = write(math.sqrt(error), digits=2)
        shown.append(Reconstruction(images.photo(image), images.covering(grid), images.photo(filled), text))
    return shown


def _enlarged(grid: Bools, size: tuple[int, ...]) -> Bools:
    """[rows, columns] of patches → [H, W, 1] of pixels."""
    rows = np.arange(size[0]) * grid.shape[0] // size[0]
    columns = np.arange(size[1]) * grid.shape[1] // size[1]
    return grid[rows[:, None], columns[None, :], None]
