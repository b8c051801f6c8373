"""Maps show the numbers that they stand for."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from mlomae.report import images, maps
from mlomae.report.pictures import Classes, Latest, read_film, read_latest
from tests.report.made import Made, make_run


def pixels(uri: str) -> NDArray[np.uint8]:
    kind, content = uri.removeprefix("data:image/").split(";base64,")
    with Image.open(io.BytesIO(base64.b64decode(content))) as image:
        assert image.format == kind.upper()
        return np.asarray(image)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "run", Made(logged=4, pictured=30))


@pytest.fixture(scope="module")
def latest(run: Path) -> Latest:
    found = read_latest(run)
    assert found is not None
    return found


def test_sequential_colours_follow_the_numbers() -> None:
    colors = pixels(images.sequential(np.array([[0.2, 0.5], [0.8, 0.9]], np.float32), 0.2, 0.8))
    assert colors.shape == (2, 2, 3)
    brightness = colors.astype(float).sum(axis=2)
    assert brightness[0, 0] < brightness[0, 1] < brightness[1, 0] == brightness[1, 1]


def test_diverging_colours_tell_signs_apart_and_hide_nothing() -> None:
    values = np.array([[1.0, -1.0, 0.0, 5.0, np.nan]], np.float32)
    colors = pixels(images.diverging(values, 1.0))
    assert tuple(colors[0, 0]) == (*images.POSITIVE, 255) == tuple(colors[0, 3])
    assert tuple(colors[0, 1]) == (*images.NEGATIVE, 255)
    assert colors[0, 2, 3] == colors[0, 4, 3] == 0


def test_cover_hides_removed_patches_only() -> None:
    colors = pixels(images.covering(np.array([[True, False]])))
    assert tuple(colors[0, 0]) == (*images.REMOVED, 255) and colors[0, 1, 3] == 0


def test_small_photos_are_exact_and_large_ones_shrink() -> None:
    rng = np.random.default_rng(0)
    small = rng.integers(0, 256, (32, 24, 3), np.uint8)
    np.testing.assert_array_equal(pixels(images.photo(small)), small)
    grey = small[..., :1]
    np.testing.assert_array_equal(pixels(images.photo(grey)), grey[..., 0])
    large = images.photo(np.zeros((480, 640, 3), np.uint8))
    assert pixels(large).shape == (144, 192, 3)


def test_bounds_hold_all_values_and_are_not_too_narrow() -> None:
    assert maps.bounds([np.array([0.31, 0.52]), np.array([0.6])]) == (0.3, 0.6)
    low, high = maps.bounds([np.array([0.75])])
    assert low <= 0.65 + 0.05 and high >= 0.8 - 0.05 and high - low == pytest.approx(0.1)
    assert maps.bounds([np.array([1.0])]) == (0.9, 1.0)
    assert maps.bounds([np.array([0.0])]) == (0.0, 0.1)


def test_strip_has_photos_steps_and_words(run: Path, latest: Latest) -> None:
    film = read_film(run)
    assert film is not None
    strip = maps.strip(film, latest, maps.probability_bounds([film]))
    assert len(strip.steps) == 24 and len(strip.rows) == len(strip.inputs) == 8
    assert {len(row) for row in strip.rows} == {24}
    last = film.probability[-1, 0]
    shown = pixels(strip.rows[0][-1].map)
    assert shown.shape == (8, 8, 3)
    # The brightest pixel is the most probable patch.
    assert shown.astype(int).sum(axis=2).argmax() == last.argmax()
    assert strip.rows[0][-1].text.endswith("%")
    assert maps.strip(film, None, (0, 1)).inputs == []
    other = replace(latest, images=latest.images[:3])
    assert maps.strip(film, other, (0, 1)).inputs == []


def test_frequency_names_its_extremes() -> None:
    frequency = np.full(6, 0.5)
    frequency[1], frequency[5] = 0.25, 1.0
    text = maps.frequency_cell(frequency, (2, 3), (0, 1)).text.replace("\N{NO-BREAK SPACE}", " ")
    assert text == ("most often removed: row 2, column 3 (100.0 %); least often: row 1, column 2 (25.0 %)")


def classes(frequency: list[list[float]], count: list[int]) -> Classes:
    names = [f"c{number}" for number in range(len(count))]
    return Classes(names, np.array(frequency, np.float32), np.array(count))


def test_classes_that_deviate_most_beyond_chance_come_first() -> None:
    # c0 deviates as far as c1, which rests on fewer images; c3 has too few of them.
    found = maps.class_maps(classes([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5], [1, 0]], [100, 20, 100, 7]), (1, 2))
    assert found is not None
    shown, _, against = found
    assert [entry.name for entry in shown] == ["c0", "c1", "c2"]
    assert [entry.count for entry in shown] == [100, 20, 100]
    mean = (0.9 * 100 + 0.1 * 20 + 0.5 * 100 + 7) / 227
    deviation = 0.9 - mean
    chance = np.sqrt(mean * (1 - mean) * (1 / 100 - 1 / 227))
    assert shown[0].excess == pytest.approx(deviation / chance, rel=1e-3)
    assert shown[0].deviation.startswith(f"{100 * deviation:.1f}")
    assert against.high.startswith("+") and against.low.startswith("\N{MINUS SIGN}")


def test_at_most_so_many_classes() -> None:
    rng = np.random.default_rng(0)
    found = maps.class_maps(classes(rng.random((30, 4)).tolist(), [10] * 30), (2, 2))
    assert found is not None and len(found[0]) == maps.MAX_CLASSES
    excess = [entry.excess for entry in found[0]]
    assert excess == sorted(excess, reverse=True)


def test_one_mask_for_all_images_deviates_nowhere() -> None:
    found = maps.class_maps(classes([[1, 1, 0], [1, 1, 0], [1, 1, 0]], [30, 30, 33]), (1, 3))
    assert found is not None and [entry.excess < 0.1 for entry in found[0]] == [True] * 3


def test_no_class_maps_without_enough_images_or_classes() -> None:
    assert maps.class_maps(classes([[0.5], [0.5]], [7, 7]), (1, 1)) is None
    assert maps.class_maps(classes([[0.5], [0.5]], [100, 0]), (1, 1)) is None


def test_influence_is_drawn_in_removed_patches_only(latest: Latest) -> None:
    found = maps.influence_overlays(latest)
    assert found is not None and latest.influence is not None
    overlays, scale = found
    assert len(overlays) == 8 and scale.high.startswith("+")
    alpha = np.stack([pixels(overlay.cell.map)[..., 3] for overlay in overlays]).reshape(8, -1)
    assert (alpha[~latest.influence.removed] == 0).all()
    assert (alpha[latest.influence.removed] > 0).mean() > 0.9
    positive = pixels(overlays[0].cell.map).reshape(-1, 4)[:, 0] == images.POSITIVE[0]
    shown = latest.influence.removed[0]
    assert (positive[shown] == (latest.influence.values[0] > 0)[shown]).all()


def test_no_influence_no_overlays(latest: Latest) -> None:
    assert maps.influence_overlays(replace(latest, influence=None)) is None
    assert latest.influence is not None
    kept = replace(latest.influence, removed=np.zeros_like(latest.influence.removed))
    assert maps.influence_overlays(replace(latest, influence=kept)) is None


def test_kept_patches_are_those_of_the_input(latest: Latest) -> None:
    black = replace(latest, reconstruction=np.zeros_like(latest.images))
    for shown, image, removed in zip(maps.reconstructions(black), latest.images, latest.removed, strict=True):
        hidden = np.kron(removed.reshape(8, 8), np.ones((4, 4), bool))
        filled = pixels(shown.filled)
        assert (filled[hidden] == 0).all()
        np.testing.assert_array_equal(filled[~hidden], image[~hidden])
        error = np.sqrt(np.mean((image[hidden] / 255.0) ** 2))
        assert float(shown.error) == pytest.approx(error, rel=0.05)
