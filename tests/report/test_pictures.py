"""Pictures of a run are read as they were taken, and damage is named."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlomae.errors import UserError
from mlomae.report.pictures import FILM, LATEST, read_film, read_latest
from mlomae.tensor_file import read_tensors, write_tensors
from tests.report.made import Made, make_run

SMALL = Made(logged=4, pictured=5, side=12)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path / "run", SMALL)


def test_film_is_read_bit_by_bit(run: Path) -> None:
    line = json.loads((run / FILM).read_text().splitlines()[1])
    film = read_film(run)
    assert film is not None
    assert (film.grid, film.steps) == ((3, 3), [16, 32, 48, 64, 80])
    assert film.probability.shape == film.removed.shape == (5, 8, 9)
    chances, bits = (base64.b64decode(line[name]) for name in ("probability", "removed"))
    for image in range(8):
        for patch in range(9):
            place = 9 * image + patch
            assert film.probability[1, image, patch] == np.float32(chances[place] / 255)
            assert film.removed[1, image, patch] == bool(bits[place // 8] >> (7 - place % 8) & 1)


def test_sampled_moments_are_even_and_keep_both_ends(run: Path) -> None:
    film = read_film(run)
    assert film is not None
    assert film.sampled(3).steps == [16, 48, 80]
    assert film.sampled(3).removed.shape == (3, 8, 9)
    assert film.sampled(5) is film


def test_latest_picture_has_colours_last(run: Path) -> None:
    latest, found = read_latest(run), read_tensors(run / LATEST)
    assert latest is not None and found is not None
    tensors, _ = found
    assert latest.images.shape == latest.reconstruction.shape == (8, 12, 12, 3)
    assert (latest.images[0, 2, 5] == tensors["images"][0, :, 2, 5].numpy()).all()
    assert latest.step == 80 and latest.grid == (3, 3) and latest.removed.dtype == bool
    assert latest.classes is not None and latest.classes.names[0] == "airplane"
    assert latest.classes.count.sum() == 200
    assert latest.influence is not None and latest.influence.step == 76


def test_what_is_optional_may_be_absent(tmp_path: Path) -> None:
    plain = make_run(tmp_path / "plain", Made(policy="random", logged=2, pictured=1, labels=False))
    latest = read_latest(plain)
    assert latest is not None and latest.classes is None and latest.influence is None
    bare = make_run(tmp_path / "bare", Made(logged=2, pictured=0))
    assert read_film(bare) is None and read_latest(bare) is None


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("probability", "AAAA", "found 3 bytes, expected 72"),
        ("removed", "§", "is damaged"),
        ("removed", "A", "not base64"),
        ("grid", [3], "is damaged"),
        ("grid", [0, 9], "a grid of 0 x 9 patches"),
        ("grid", [1, 9], "found 8 images of (1, 9) patches, before 8 of (3, 3)"),
        ("step", "soon", "is damaged"),
        ("images", None, "is damaged"),
    ],
)
def test_damaged_film_names_its_line(run: Path, field: str, value: Any, message: str) -> None:
    lines = (run / FILM).read_text().splitlines()
    lines[2] = json.dumps({**json.loads(lines[2]), field: value})
    (run / FILM).write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError) as caught:
        read_film(run)
    assert f"{run / FILM}: line 3 is damaged: " in str(caught.value)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_missing_field_of_the_film_is_named(run: Path) -> None:
    (run / FILM).write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="line 1 is damaged: 'grid' is missing"):
        read_film(run)


Tensors = dict[str, torch.Tensor]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("images"), "'images' is missing"),
        (lambda t: t.update(images=t["images"].float()), "expected bytes [N, 1 or 3, H, W]"),
        (
            lambda t: t.update(reconstruction=t["reconstruction"][:2].clone()),
            "reconstruction is (2, 12, 12, 3)",
        ),
        (lambda t: t.update(frequency=torch.zeros(4)), "frequency is (4,), expected (9,)"),
        (lambda t: t.update(removed=t["removed"][:, :4].clone()), "removed is (8, 4), expected (8, 9)"),
        (lambda t: t.pop("class_count"), "'class_count' is missing"),
        (lambda t: t.update(class_frequency=torch.zeros(2, 9)), "class_frequency is (2, 9), expected (6, 9)"),
        (lambda t: t.pop("influence_images"), "'influence_images' is missing"),
    ],
)
def test_damaged_latest_picture_is_named(run: Path, change: Callable[[Tensors], Any], message: str) -> None:
    found = read_tensors(run / LATEST)
    assert found is not None
    tensors, state = found
    change(tensors)
    write_tensors(run / LATEST, tensors, state)
    with pytest.raises(UserError) as caught:
        read_latest(run)
    assert str(run / LATEST) in str(caught.value) and message in str(caught.value)


def test_file_that_is_no_safetensors_is_named(run: Path) -> None:
    (run / LATEST).write_bytes(b"PK\x03\x04")
    with pytest.raises(UserError, match=r"pictures\.safetensors is damaged: "):
        read_latest(run)
