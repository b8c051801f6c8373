"""Small image folders."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def fill_images(tmp_path: Path) -> Callable[..., Path]:
    """Writes 8x8 images of noise into two class folders, or into none; returns their folder."""
    numbers = count()

    def fill(mode: str = "RGB", amount: int = 60, labelled: bool = True, first: int = 0) -> Path:
        root = tmp_path / f"images{next(numbers)}"
        for seed in range(first, first + amount):
            folder = root / f"class{seed % 2}" if labelled else root
            folder.mkdir(parents=True, exist_ok=True)
            shape = (8, 8) if mode == "L" else (8, 8, 3)
            pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{seed:04d}.png")
        return root

    return fill
