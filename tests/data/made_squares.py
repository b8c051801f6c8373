"""Scenes of coloured squares with noise: a pixel's colour tells its class."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = np.array(
    [(60, 60, 200), (60, 190, 60), (210, 60, 60)]
)  # of the background and two kinds of squares
NAMES = ("background", "green", "red")
VOID = 255


def draw_squares(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Image uint8 [H, W, 3] and label values uint8 [H, W], whose last row is void."""
    generator = np.random.default_rng(seed)
    labels = np.zeros((height, width), np.uint8)
    for _ in range(3):
        side = int(generator.integers(height // 4, height // 2))
        top, left = (int(generator.integers(0, length - side)) for length in (height, width))
        labels[top : top + side, left : left + side] = generator.integers(1, len(COLOURS))
    image = (COLOURS[labels] + generator.normal(0, 15, (height, width, 3))).clip(0, 255).astype(np.uint8)
    labels[-1] = VOID
    return image, labels


def encode_png(pixels: np.ndarray) -> bytes:
    """Grey or RGB, by its shape."""
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    return content.getvalue()


def write_squares(
    root: Path, part: str, count: int, first_seed: int = 0, size: tuple[int, int] = (32, 32)
) -> None:
    """``count`` scenes s0.png, s1.png, … in ADE20K's layout."""
    images, maps = root / "images" / part, root / "annotations" / part
    for folder in (images, maps):
        folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        image, labels = draw_squares(first_seed + number, *size)
        (images / f"s{number}.png").write_bytes(encode_png(image))
        (maps / f"s{number}.png").write_bytes(encode_png(labels))
