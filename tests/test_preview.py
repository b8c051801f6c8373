"""The picture of a run: a readable PNG for every policy, with the right content."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import mlomae_kernels
from mlomae.config import Config
from mlomae.distributed.engine import TorchEngine
from mlomae.levels import PretrainLevel, mask_scores
from mlomae.models.mae import MaskedAutoencoder
from mlomae.models.masking import build_masking_network
from mlomae.models.selection import MaskPolicy
from mlomae.preview import Preview, preview
from mlomae.visualize import mask_picture

POLICIES = ("learned", "random", "fixed", "weighted-random", "block", "hard")
IMAGES = 3
MEAN, STD = torch.tensor([0.5, 0.4, 0.3])[:, None, None], torch.tensor([0.2, 0.3, 0.25])[:, None, None]


def _level(policy: str, norm_pix: bool = True) -> PretrainLevel:
    config = Config.model_validate(
        {
            "model": dict(arch="vit_pico", img_size=[8, 12], patch_size=2, decoder_dim=32, decoder_depth=1,
                          decoder_heads=2, norm_pix=norm_pix),
            "masking": dict(policy=policy, ratio=0.75, hidden=8),
        }
    )  # fmt: skip
    autoencoder = MaskedAutoencoder(config.model)
    network = None
    if config.masking.scored:
        network = build_masking_network(config.masking, config.model.grid, autoencoder.encoder.embed_dim)
    mask_policy = MaskPolicy(config.masking, config.model.grid, config.num_keep, seed=0)
    stream: Any = None
    return PretrainLevel(TorchEngine(autoencoder, config.pretrain), stream, config, mask_policy, network)


def _images() -> Tensor:
    return (torch.rand(IMAGES, 3, 8, 12) - MEAN) / STD


def show(level: PretrainLevel, images: Tensor) -> Preview:
    return preview(level.autoencoder, level.masking_network, level.policy, images, MEAN, STD)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_readable_picture_is_written(policy: str, tmp_path: Path) -> None:
    level = _level(policy)
    before = {name: value.clone() for name, value in level.autoencoder.state_dict().items()}
    path = tmp_path / "mask.png"
    mask_picture(path, show(level, _images()), f"{policy} mask")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert min(image.size) > 100
        assert len(image.convert("RGB").getcolors(2**24) or []) > 50  # not an empty page
    assert [file.name for file in tmp_path.iterdir()] == ["mask.png"]
    assert all(torch.equal(before[name], v) for name, v in level.autoencoder.state_dict().items())


@pytest.mark.parametrize("policy", POLICIES)
def test_masks_keep_the_exact_number_and_probabilities_are_probabilities(policy: str) -> None:
    drawn = show(_level(policy), _images())
    assert torch.equal(drawn.mask.sum(dim=1), torch.full((IMAGES,), 18.0))
    assert drawn.probability.shape == (IMAGES, 24)
    assert drawn.probability.min() >= 0 and drawn.probability.max() <= 1


def test_inputs_are_shown_as_they_were_before_normalisation() -> None:
    images = _images()
    drawn = show(_level("random"), images)
    torch.testing.assert_close(drawn.images, images * STD + MEAN)


@pytest.mark.parametrize("policy", ["learned", "hard"])
def test_mask_by_score_is_shown_without_noise(policy: str) -> None:
    level, images = _level(policy), _images()
    drawn = show(level, images)
    _, scores = mask_scores(level.autoencoder, level.masking_network, images)
    assert scores is not None
    torch.testing.assert_close(drawn.probability, scores.sigmoid())
    threshold = scores.sort(dim=1).values[:, 5:6]
    assert torch.equal(drawn.mask, (scores > threshold).float())


def test_weighted_random_shows_learned_weights_and_a_random_mask() -> None:
    level, images = _level("weighted-random"), _images()
    drawn = show(level, images)
    _, scores = mask_scores(level.autoencoder, level.masking_network, images)
    assert scores is not None
    torch.testing.assert_close(drawn.probability, scores.sigmoid())
    expected = level.policy.select(None, IMAGES, 0, 0, images.device).mask
    assert torch.equal(drawn.mask, expected)


def test_probability_of_a_policy_that_does_not_learn_is_its_frequency() -> None:
    random = show(_level("random"), _images()).probability
    # Standard error of 64 draws: 0.05.
    assert (random - 0.75).abs().max() < 0.25
    assert random.mean().item() == pytest.approx(0.75)
    fixed = show(_level("fixed"), _images())
    assert torch.equal(fixed.probability, fixed.mask)
    assert (fixed.mask == fixed.mask[0]).all()


@pytest.mark.parametrize("norm_pix", [False, True])
def test_a_perfect_prediction_is_shown_as_the_image(norm_pix: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    level, images = _level("random", norm_pix), _images()
    target = mlomae_kernels.patchify(images, 2)
    if norm_pix:
        target = (target - target.mean(dim=2, keepdim=True)) / (target.var(dim=2, keepdim=True) + 1e-6).sqrt()
    monkeypatch.setattr(level.autoencoder, "reconstruct", lambda *_: target)
    drawn = show(level, images)
    torch.testing.assert_close(drawn.reconstruction, drawn.images, rtol=1e-4, atol=1e-5)
