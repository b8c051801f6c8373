"""``mlomae.load_encoder`` and the module that it returns."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import mlomae
from mlomae.data.loader import LevelLoaders
from mlomae.errors import UserError
from mlomae.interop.encoder import Encoder
from mlomae.models.encoder import pool_features
from tests.architecture.source_tree import ROOT
from tests.interop.made import CLOSE, EXACT, autoencoder_of, config_of, images_of, write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = config_of(model__pool="cls+mean")
    return write_run(tmp_path / "run", config, autoencoder_of(config))


@pytest.fixture
def encoder(run: Path) -> Encoder:
    return mlomae.load_encoder(run)


def pictures(folder: Path, count: int = 3) -> list[Path]:
    folder.mkdir()
    for number in range(count):
        pixels = np.random.default_rng(number).integers(0, 256, (20 + number, 30, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.{'jpg' if number else 'png'}")
    return sorted(folder.iterdir())


def test_features_and_tokens(encoder: Encoder) -> None:
    config = config_of(model__pool="cls+mean")
    images = images_of(config)
    with torch.no_grad():
        expected = autoencoder_of(config).encoder(images)
        tokens, features = encoder.tokens(images), encoder(images)

    torch.testing.assert_close(tokens, expected, **CLOSE)
    torch.testing.assert_close(features, pool_features(expected, "cls+mean"), **CLOSE)
    assert features.shape == (3, encoder.num_features) == (3, 128)
    assert encoder.img_size == (16, 16)
    assert not encoder.training
    assert encoder(images).requires_grad  # an ordinary module: gradients are the caller's choice


def test_preprocessing_is_that_of_evaluation(encoder: Encoder, tmp_path: Path) -> None:
    paths = pictures(tmp_path / "photos", 8)
    config = config_of(data__path=tmp_path / "photos", masking__policy="random", pretrain__batch_size=2)
    loaders = LevelLoaders(config, 0, 1, torch.device("cpu"))
    of_run = [tuple(image.flatten().tolist()) for image in loaders.sample("train", 8).images]
    loaders.close()

    batch = encoder.preprocess(paths)

    ours = [tuple(image.flatten().tolist()) for image in batch]
    assert batch.shape == (8, 3, 16, 16)
    assert of_run and set(of_run) <= set(ours)


def test_all_kinds_of_pictures_give_the_same(encoder: Encoder, tmp_path: Path) -> None:
    path, *_ = pictures(tmp_path / "photos")  # a PNG: nothing is lost
    image = Image.open(path)
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    expected = encoder.preprocess(path)
    assert expected.shape == (1, 3, 16, 16) and expected.dtype == torch.float32
    for given in (str(path), image, tensor, tensor[None], [image], [str(path)]):
        torch.testing.assert_close(encoder.preprocess(given), expected, **EXACT)
    fitting = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    by_hand = (fitting / 255 - torch.tensor(encoder.mean)[:, None, None]) / torch.tensor(encoder.std)[
        :, None, None
    ]
    torch.testing.assert_close(encoder.preprocess(fitting), by_hand, **CLOSE)


def test_pictures_of_16_bits_are_scaled(tmp_path: Path) -> None:
    config = config_of(model__in_chans=1)
    encoder = mlomae.load_encoder(write_run(tmp_path / "run", config, autoencoder_of(config)))
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    expected = encoder.preprocess(tmp_path / "deep.png")
    assert len(expected.unique()) > 250
    with Image.open(tmp_path / "deep.png") as image:
        torch.testing.assert_close(encoder.preprocess(image), expected, **EXACT)


def test_grey_encoders_take_colour_pictures(tmp_path: Path) -> None:
    config = config_of(model__in_chans=1)
    encoder = mlomae.load_encoder(write_run(tmp_path / "run", config, autoencoder_of(config)))
    image = Image.open(pictures(tmp_path / "photos")[0])
    torch.testing.assert_close(encoder.preprocess(image), encoder.preprocess(image.convert("L")), **EXACT)
    assert encoder(encoder.preprocess(image)).shape == (1, 64)


def test_another_image_size(run: Path) -> None:
    encoder = mlomae.load_encoder(str(run), img_size=(8, 24))
    assert encoder.img_size == (8, 24)
    assert encoder.tokens(encoder.preprocess(Image.new("RGB", (50, 40)))).shape == (1, 1 + 2 * 6, 64)
    with pytest.raises(
        UserError, match=r"img_size: \[18, 18\] is not divisible by the encoder's patch size 4"
    ):
        mlomae.load_encoder(run, img_size=18)


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.zeros(3, 3, 16, 20), r"found torch.float32 \[3, 3, 16, 20\], expected .* \[B, 3, 16, 16\]"),
        (torch.zeros(1, 1, 16, 16), r"found torch.float32 \[1, 1, 16, 16\]"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), r"found torch.uint8 .* see Encoder.preprocess"),
    ],
)
def test_wrong_batches_are_refused(images: Tensor, found: str, encoder: Encoder) -> None:
    with pytest.raises(ValueError, match=found):
        encoder(images)


def test_wrong_pictures_are_refused(encoder: Encoder, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    with pytest.raises(UserError, match=r"text\.jpg: starts with"):
        encoder.preprocess(tmp_path / "text.jpg")
    with pytest.raises(UserError, match=r"nothing\.jpg: cannot be read"):
        encoder.preprocess([tmp_path / "nothing.jpg"])
    with pytest.raises(
        ValueError, match=r"found torch.float32 \[3, 16, 16\], expected torch.uint8 \[3, H, W\]"
    ):
        encoder.preprocess(torch.zeros(2, 3, 16, 16))
    with pytest.raises(ValueError, match=r"found torch.uint8 \[1, 16, 16\]"):
        encoder.preprocess(torch.zeros(1, 16, 16, dtype=torch.uint8))
    with pytest.raises(ValueError, match="found none"):
        encoder.preprocess([])


def test_it_says_what_it_is(encoder: Encoder) -> None:
    millions = sum(parameter.numel() for parameter in encoder.parameters()) / 1e6
    assert repr(encoder) == (
        "Encoder(vit_pico, images 3 x 16 x 16, patch size 4, pool cls+mean: 128 features, "
        f"{millions:.1f} M parameters)"
    )


def test_the_notebook_of_the_docs_runs(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/interop.md").read_text(), re.DOTALL)
    (tmp_path / "runs").mkdir()
    run.rename(tmp_path / "runs/x")
    for name in ("photo.jpg", "other.png"):
        Image.new("RGB", (30, 20)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)

    names: dict[str, Any] = {}
    exec(code, names)

    assert names["features"].shape == (2, 128) and names["tokens"].shape == (2, 17, 64)


def test_importing_the_package_stays_light() -> None:
    code = (
        "import sys, mlomae\n"
        "assert 'load_encoder' in dir(mlomae)\n"
        "heavy = {'torch', 'timm', 'transformers', 'numpy', 'pydantic'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="module 'mlomae' has no attribute 'nothing'"):
        getattr(mlomae, "nothing")  # noqa: B009 - a type checker knows that it is not there
