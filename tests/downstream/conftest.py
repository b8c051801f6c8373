"""Encoders and labelled images, made once: tests that write into a run take a copy of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mlomae.trainer import Trainer
from tests.integration.tiny import tiny_config, train

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}
"""Class → mean colour of its images."""
NUM_IMAGES = {"train": 20, "test": 6}
"""Images per class."""


class WithoutPictures(Trainer):
    """Neither draws nor evaluates, which takes longer than a tiny run."""

    def _draw(self) -> None:
        if self.world.primary:
            Image.new("L", (1, 1)).save(self.run_dir.picture)

    def evaluate(self) -> dict[str, object]:
        return {}


@pytest.fixture(scope="session")
def digits_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory: vit_pico, grey digits of 8x8 pixels in patches of 2."""
    folder = tmp_path_factory.mktemp("digits") / "run"
    train(tiny_config({"run_dir": folder}), kind=WithoutPictures)
    return folder


@pytest.fixture(scope="session")
def colour_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train/CLASS and test/CLASS with PNGs of 32x32 pixels in colour, noise around the class's colour."""
    folder = tmp_path_factory.mktemp("colours")
    generator = np.random.default_rng(0)
    for part, count in NUM_IMAGES.items():
        for name, colour in COLOURS.items():
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                pixels = generator.normal(colour, 40, (32, 32, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / part / name / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="session")
def colour_run(tmp_path_factory: pytest.TempPathFactory, colour_folder: Path) -> Path:
    """A run directory: vit_pico, ``colour_folder`` at 32x32 pixels in patches of 8."""
    folder = tmp_path_factory.mktemp("colour") / "run"
    fields = {
        "run_dir": folder,
        "model.img_size": 32,
        "model.patch_size": 8,
        "model.in_chans": 3,
        "data.dataset": "folder",
        "data.path": str(colour_folder),
    }
    train(tiny_config(fields), kind=WithoutPictures)
    return folder
