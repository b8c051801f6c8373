"""Digits among stripes: images in which most patches say nothing about the class, but much to a reconstruction.

``python benchmarks/studies/clutter.py FOLDER`` writes an image folder: scikit-learn's digits (8x8) at random places
of 16x16 images, the rest filled with stripes whose direction, width, phase and contrast are drawn for each image. A
quarter of the patches is worth reconstructing for a classifier; which ones differs from image to image.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits

SIDE, DIGIT = 16, 8
COPIES = 4
"""Of each digit, at other places among other stripes."""
TEST_SHARE = 0.2


def stripes(rng: np.random.Generator) -> NDArray[np.float64]:
    """[SIDE, SIDE] in [0, 1]."""
    down, across = np.mgrid[:SIDE, :SIDE]
    angle, length, phase = rng.uniform(0, np.pi), rng.uniform(3, 10), rng.uniform(0, 2 * np.pi)
    wave = np.sin(2 * np.pi * (np.cos(angle) * across + np.sin(angle) * down) / length + phase)
    return 0.5 + 0.5 * rng.uniform(0.5, 1.0) * wave


def write(folder: Path, seed: int = 0) -> None:
    """Writes ``train`` and ``test``; all copies of a digit are in the same part."""
    digits = load_digits()
    rng = np.random.default_rng(seed)
    is_test = rng.random(len(digits.images)) < TEST_SHARE
    for number, (digit, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        place = folder / ("test" if is_test[number] else "train") / str(label)
        place.mkdir(parents=True, exist_ok=True)
        for copy in range(COPIES):
            image = stripes(rng)
            top, left = rng.integers(0, SIDE - DIGIT + 1, size=2)
            image[top : top + DIGIT, left : left + DIGIT] = digit / 16
            Image.fromarray((255 * image).round().astype(np.uint8)).save(place / f"{number:04}-{copy}.png")


if __name__ == "__main__":
    write(Path(sys.argv[1]))
