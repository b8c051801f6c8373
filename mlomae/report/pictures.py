"""The pictures that a run has taken of its mask, as arrays."""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from mlomae.errors import UserError
from mlomae.report.lines import read_lines

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Grid = tuple[int, int]

FILM, LATEST = "pictures.jsonl", "pictures.safetensors"


@dataclass(frozen=True)
class Film:
    """How the mask of the same held-out images developed.

    Attributes:
        grid: (rows, columns) of patches, L = rows * columns.
        steps: [T], increasing.
        probability: [T, N, L], of removing each patch.
        removed: [T, N, L], by the mask without noise.
    """

    grid: Grid
    steps: list[int]
    probability: Floats
    removed: Bools

    def sampled(self, count: int) -> Film:
        """At most ``count`` evenly spaced moments, the first and the last among them."""
        if len(self.steps) <= count:
            return self
        chosen = np.linspace(0, len(self.steps) - 1, count).round().astype(int)
        steps = [self.steps[index] for index in chosen]
        return Film(self.grid, steps, self.probability[chosen], self.removed[chosen])


@dataclass(frozen=True)
class Classes:
    """What is removed in the images of each class of the held-out sample.

    Attributes:
        names: [K].
        frequency: [K, L], share of the images in which the position is removed.
        count: [K], images.
    """

    names: list[str]
    frequency: Floats
    count: NDArray[np.int64]


@dataclass(frozen=True)
class Influence:
    """The last influence that was computed, of some images of its batch.

    Attributes:
        step: of the run.
        images: [M, H, W, C].
        values: [M, L], derivative of each patch's error along the direction; positive: to weight this patch's
            loss up lowers the held-out loss.
        removed: [M, L], where it counts.
    """

    step: int | None
    images: Bytes
    values: Floats
    removed: Bools


@dataclass(frozen=True)
class Latest:
    """The latest picture, of N held-out images.

    Attributes:
        images: [N, H, W, C].
        reconstruction: [N, H, W, C], kept patches as in the images.
        removed: [N, L].
        frequency: [L], share of a larger held-out sample in which each position is removed, without noise.
    """

    step: int
    grid: Grid
    images: Bytes
    reconstruction: Bytes
    removed: Bools
    frequency: Floats
    classes: Classes | None
    influence: Influence | None


def read_film(run: Path) -> Film | None:
    """The film of a run directory; None where it has none.

    Raises:
        UserError: the file is damaged.
    """
    frames: dict[int, tuple[Bytes, Bools]] = {}
    first: tuple[Grid, int] | None = None
    for place, row in read_lines(run / FILM):
        try:
            step, grid, images = int(row["step"]), _grid(row["grid"]), int(row["images"])
            first = first or (grid, images)
            if (grid, images) != first:
                raise ValueError(f"found {images} images of {grid} patches, before {first[1]} of {first[0]}")
            shape = (images, math.prod(grid))
            chances = _decoded(row["probability"], math.prod(shape)).reshape(shape)
            packed = _decoded(row["removed"], math.ceil(math.prod(shape) / 8))
            removed = np.unpackbits(packed, count=math.prod(shape)).reshape(shape)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{place} is damaged: {_reason(error)}") from None
        frames[step] = chances, removed.astype(bool)
    if first is None:
        return None
    steps = sorted(frames)
    probability = (np.stack([frames[step][0] for step in steps]) / 255).astype(np.float32)
    return Film(first[0], steps, probability, np.stack([frames[step][1] for step in steps]))


def read_latest(run: Path) -> Latest | None:
    """The latest picture of a run directory; None where it has none.

    Raises:
        UserError: the file is damaged.
    """
    path = run / LATEST
    if not path.exists():
        return None
    # Not with mlomae.tensor_file: torch alone takes longer to import than a report to write.
    try:
        with safe_open(path, framework="numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            state = json.loads((file.metadata() or {})["state"])
        return _latest(arrays, state)
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged: {_reason(error)}") from None


def _latest(arrays: Mapping[str, NDArray[Any]], state: Mapping[str, Any]) -> Latest:
    grid = _grid(state["grid"])
    patches = math.prod(grid)
    images = _photos(arrays["images"])
    count = len(images)
    reconstruction = _photos(arrays["reconstruction"])
    if reconstruction.shape != images.shape:
        raise ValueError(f"reconstruction is {reconstruction.shape}, images are {images.shape}")
    return Latest(
        step=int(state["step"]),
        grid=grid,
        images=images,
        reconstruction=reconstruction,
        removed=_shaped(arrays, "removed", (count, patches)).astype(bool),
        frequency=_shaped(arrays, "frequency", (patches,)).astype(np.float32),
        classes=_classes(arrays, state, patches) if "class_frequency" in arrays else None,
        influence=_influence(arrays, state, patches) if "influence" in arrays else None,
    )


def _classes(arrays: Mapping[str, NDArray[Any]], state: Mapping[str, Any], patches: int) -> Classes:
    count = arrays["class_count"].astype(np.int64)
    frequency = _shaped(arrays, "class_frequency", (len(count), patches)).astype(np.float32)
    names = state.get("class_names") or [f"class {number}" for number in range(len(count))]
    if len(names) != len(count):
        raise ValueError(f"{len(names)} names of {len(count)} classes")
    return Classes([str(name) for name in names], frequency, count)


def _influence(arrays: Mapping[str, NDArray[Any]], state: Mapping[str, Any], patches: int) -> Influence:
    images = _photos(arrays["influence_images"])
    shape = (len(images), patches)
    return Influence(
        step=state.get("influence_step"),
        images=images,
        values=_shaped(arrays, "influence", shape).astype(np.float32),
        removed=_shaped(arrays, "influence_removed", shape).astype(bool),
    )


def _photos(images: NDArray[Any]) -> Bytes:
    """[N, C, H, W] → [N, H, W, C]."""
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3) or not images.size:
        raise ValueError(f"found images {images.dtype}{images.shape}, expected bytes [N, 1 or 3, H, W]")
    return images.transpose(0, 2, 3, 1)


def _shaped(arrays: Mapping[str, NDArray[Any]], name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if arrays[name].shape != shape:
        raise ValueError(f"{name} is {arrays[name].shape}, expected {shape}")
    return arrays[name]


def _grid(value: Any) -> Grid:
    rows, columns = map(int, value)
    if rows < 1 or columns < 1:
        raise ValueError(f"found a grid of {rows} x {columns} patches")
    return rows, columns


def _decoded(text: str, count: int) -> Bytes:
    content = np.frombuffer(base64.b64decode(text, validate=True), np.uint8)
    if len(content) != count:
        raise ValueError(f"found {len(content)} bytes, expected {count}")
    return content


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"{error} is missing"
    if isinstance(error, binascii.Error):
        return f"not base64 ({error})"
    return " ".join(str(error).split())
