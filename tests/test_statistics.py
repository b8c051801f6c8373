"""What the log says about a mask, against definitions written out."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from mlomae.statistics import SATURATED_SLOPE, mask_agreement, score_statistics


def _agreement(mask: Tensor) -> float:
    return mask_agreement(mask.mean(dim=0), len(mask)).item()


def test_agreement_is_the_mean_over_pairs_of_images() -> None:
    mask = (torch.rand(7, 12) < 0.6).float()
    pairs = [(mask[i] == mask[j]).float().mean().item() for i, j in combinations(range(7), 2)]
    assert _agreement(mask) == pytest.approx(sum(pairs) / len(pairs))


def test_agreement_is_one_for_one_mask_and_zero_for_opposite_ones() -> None:
    assert _agreement(torch.tensor([[0.0, 1.0, 1.0]]).expand(5, -1)) == 1
    assert _agreement(torch.tensor([[0.0, 1.0], [1.0, 0.0]])) == 0


def test_agreement_of_random_masks_is_chance() -> None:
    mask = (torch.rand(2000, 50) < 0.75).float()
    assert _agreement(mask) == pytest.approx(0.75**2 + 0.25**2, abs=0.005)


def test_a_single_image_agrees_with_nobody() -> None:
    assert _agreement(torch.tensor([[0.0, 1.0, 1.0]])) == 0


def test_entropy_is_in_bits() -> None:
    scores = torch.tensor([[0.0, math.log(3.0)], [-math.log(3.0), 0.0]])
    quarter = -(0.25 * math.log2(0.25) + 0.75 * math.log2(0.75))
    assert score_statistics(scores, 4.0)["mask/entropy"].item() == pytest.approx((1 + quarter) / 2)


def test_entropy_of_certain_scores_is_zero_and_finite() -> None:
    statistics = score_statistics(torch.tensor([[-200.0, 200.0]]), 200.0)
    assert statistics["mask/entropy"] == 0
    assert statistics["mask/saturation"] == 1


def test_saturation_is_the_share_of_scores_with_a_flat_probability() -> None:
    """Checked on the derivative of the probability by the raw score that the bound squashes."""
    bound = 4.0
    raw = torch.linspace(-12, 12, 2001, dtype=torch.float64).requires_grad_()
    scores = bound * torch.tanh(raw / bound)
    (slope,) = torch.autograd.grad(scores.sigmoid().sum(), raw)
    expected = (slope / slope.max() < SATURATED_SLOPE).double().mean()
    assert 0.2 < expected < 0.8
    found = score_statistics(scores.detach()[None], bound)["mask/saturation"]
    assert found.item() == pytest.approx(expected.item(), abs=1e-3)


def test_fresh_scores_are_not_saturated() -> None:
    statistics = score_statistics(0.2 * torch.randn(8, 64), 4.0)
    assert statistics["mask/saturation"] == 0
    assert statistics["mask/entropy"] > 0.98


def test_spread_is_within_the_image() -> None:
    scores = torch.tensor([[0.0, 2.0], [10.0, 12.0]])
    assert score_statistics(scores, 20.0)["mask/spread"].item() == pytest.approx(math.sqrt(2))
