"""The mask picture shows, pixel for pixel, what it says it shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from mlomae.preview import Preview
from mlomae.visualize import CELL, FOOT, GAP, GREY, HEAD, MARGIN, MAX_BYTES, STRIPE, mask_picture

PATCH = 2
KEPT = (0, 5, 6)  # of a 4 x 4 grid


@pytest.fixture
def digits() -> dict[str, Tensor]:
    """Two 8 x 8 images, white (never a grey of the mask), with black reconstructions."""
    mask = torch.ones(2, 16)
    mask[:, list(KEPT)] = 0
    probability = torch.linspace(0, 1, 16).repeat(2, 1)
    return {
        "images": torch.ones(2, 1, 8, 8),
        "probability": probability,
        "mask": mask,
        "reconstruction": torch.zeros(2, 1, 8, 8),
    }


def read(path: Path) -> NDArray[np.uint8]:
    with Image.open(path) as picture:
        picture.verify()
    with Image.open(path) as picture:
        assert (picture.format, picture.mode) == ("PNG", "RGB")
        return np.asarray(picture)


def cell(page: NDArray[np.uint8], row: int, column: int) -> NDArray[np.uint8]:
    top, left = HEAD + row * (CELL + GAP), MARGIN + column * (CELL + GAP)
    return page[top : top + CELL, left : left + CELL]


def expected(per_patch: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return np.kron(per_patch.reshape(4, 4), np.ones((CELL // 4, CELL // 4), dtype=bool))


def test_layout_and_content(tmp_path: Path, digits: dict[str, Tensor]) -> None:
    mask_picture(tmp_path / "mask.png", Preview(**digits, grid=(4, 4)), "step 10")
    page = read(tmp_path / "mask.png")
    assert page.shape == (HEAD + 2 * (CELL + GAP) + FOOT, 2 * MARGIN + 4 * CELL + 3 * GAP, 3)
    removed = expected(digits["mask"][0].numpy() > 0.5)
    for row in range(2):
        assert (cell(page, row, 0) == 255).all()
        masked = cell(page, row, 2)
        assert set(np.unique(masked[removed])) == {GREY, STRIPE}
        assert (masked[~removed] == 255).all()
        composed = cell(page, row, 3)
        assert (composed[removed] == 0).all()
        assert (composed[~removed] == 255).all()
    assert (page[:HEAD] < 80).any()  # dark text
    assert (page[[0, -1]] == 255).all()
    assert (page[:, [0, -1]] == 255).all()


def test_probability_map_is_crisp_and_grows_brighter(tmp_path: Path, digits: dict[str, Tensor]) -> None:
    mask_picture(tmp_path / "mask.png", Preview(**digits, grid=(4, 4)), "step 10")
    colors = cell(read(tmp_path / "mask.png"), 0, 1).reshape(4, CELL // 4, 4, CELL // 4, 3).astype(float)
    assert (colors == colors[:, :1, :, :1]).all()
    luminance = (colors[:, 0, :, 0] @ np.array([0.2126, 0.7152, 0.0722])).flatten()
    assert (np.diff(luminance) > 0).all()


def test_nearly_equal_probabilities_look_alike(tmp_path: Path, digits: dict[str, Tensor]) -> None:
    digits["probability"] = 0.75 + 0.001 * digits["probability"]
    mask_picture(tmp_path / "mask.png", Preview(**digits, grid=(4, 4)), "step 10")
    colors = cell(read(tmp_path / "mask.png"), 0, 1).astype(int)
    assert np.ptp(colors, axis=(0, 1)).max() <= 3


def test_frequency_adds_a_row_in_the_probability_column(tmp_path: Path, digits: dict[str, Tensor]) -> None:
    frequency = digits["probability"][0]
    mask_picture(tmp_path / "mask.png", Preview(**digits, grid=(4, 4)), "step 10", frequency=frequency)
    page = read(tmp_path / "mask.png")
    assert page.shape[0] == HEAD + 3 * (CELL + GAP) + FOOT
    assert np.array_equal(cell(page, 2, 1), cell(page, 0, 1))
    assert (cell(page, 2, 2) == 255).all()


def test_influence_adds_a_column_with_colours_by_sign(tmp_path: Path, digits: dict[str, Tensor]) -> None:
    influence = torch.linspace(-1, 1, 16).repeat(2, 1)
    mask_picture(tmp_path / "mask.png", Preview(**digits, grid=(4, 4)), "step 10", influence=influence)
    page = read(tmp_path / "mask.png")
    assert page.shape[1] == 2 * MARGIN + 5 * CELL + 4 * GAP
    colours = cell(page, 0, 2).reshape(4, CELL // 4, 4, CELL // 4, 3)[:, 0, :, 0].reshape(16, 3).astype(int)
    redder = colours[:, 0] - colours[:, 2]
    removed = [position for position in range(16) if position not in KEPT]
    assert redder[removed[0]] < -50 and redder[removed[-1]] > 50
    assert (redder[[p for p in removed if p < 8]] <= 0).all() and (
        redder[[p for p in removed if p > 7]] >= 0
    ).all()
    assert (np.ptp(colours[list(KEPT)], axis=1) == 0).all()  # the image in grey, whatever the values there
    assert np.array_equal(cell(page, 0, 4), cell(page, 1, 4))


@pytest.mark.parametrize("size", [(224, 320), (64, 16), (3 * 96, 96)])
def test_large_and_oblong_photos_stay_small_files(tmp_path: Path, size: tuple[int, int]) -> None:
    """Noise is the worst case for PNG."""
    images = torch.rand(6, 3, *size, generator=torch.Generator().manual_seed(0))
    grid = (size[0] // 16, size[1] // 16)
    mask = (torch.arange(grid[0] * grid[1]) % 4 > 0).float().expand(6, -1)
    shown = Preview(images, mask * 0.5, mask, images, grid)
    mask_picture(tmp_path / "mask.png", shown, "step 10 " * 12)
    page = read(tmp_path / "mask.png")
    assert page.shape[1] <= 1600
    assert (tmp_path / "mask.png").stat().st_size <= MAX_BYTES
    assert (page[:, -4:] == 255).all()  # the long title fits


def test_replaced_in_one_step(
    tmp_path: Path, digits: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mask.png"
    mask_picture(path, Preview(**digits, grid=(4, 4)), "old")
    old = path.read_bytes()

    def fail(source: Path, target: Path) -> None:
        raise OSError("killed")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="killed"):
        mask_picture(path, Preview(**digits, grid=(4, 4)), "new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["mask.png"]
    assert path.read_bytes() == old
