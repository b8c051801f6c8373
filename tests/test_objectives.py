"""The three losses against sums written out."""

from __future__ import annotations

import math

import pytest
import torch

from mlomae.objectives import head_loss, mask_loss, pretrain_loss

ERRORS = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
MASK = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]])
WEIGHTS = torch.tensor([[0.5, 0.9, 0.1], [0.9, 0.2, 1.0]])


def test_pretrain_loss_is_a_weighted_mean_over_the_removed_patches() -> None:
    assert pretrain_loss(ERRORS, MASK, None).item() == pytest.approx((1 + 3 + 5 + 6) / 4)
    expected = (0.5 * 1 + 0.1 * 3 + 0.2 * 5 + 1.0 * 6) / 4  # by the number removed, not by the sum of weights
    assert pretrain_loss(ERRORS, MASK, WEIGHTS).item() == pytest.approx(expected)


def test_kept_patches_do_not_enter_the_pretrain_loss() -> None:
    errors = ERRORS.clone()
    errors[MASK == 0] = 1e6
    assert torch.equal(pretrain_loss(errors, MASK, WEIGHTS), pretrain_loss(ERRORS, MASK, WEIGHTS))


def test_head_loss_is_the_mean_cross_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]])
    loss = head_loss(logits, torch.tensor([0, 1]))
    assert loss.item() == pytest.approx((math.log(2) + math.log(4)) / 2)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_head_loss_is_taken_at_least_in_float32(given: torch.dtype, taken: torch.dtype) -> None:
    assert head_loss(torch.zeros(2, 3, dtype=given), torch.tensor([0, 1])).dtype == taken


def test_mask_loss_has_the_hypergradient_as_its_gradient() -> None:
    probability = WEIGHTS.clone().requires_grad_()
    influence = torch.tensor([[1.0, -2.0, 3.0], [-4.0, 5.0, -6.0]])
    (gradient,) = torch.autograd.grad(mask_loss(probability, MASK, influence, 0.1), probability)
    torch.testing.assert_close(gradient, -0.1 * MASK / 4 * influence)


def test_mask_loss_raises_the_probability_of_patches_whose_error_hurts_the_heldout_loss() -> None:
    """Positive influence: the patch's error and L_val rise together along v, so learning it helps."""
    probability = torch.full((1, 2), 0.5, requires_grad=True)
    influence = torch.tensor([[1.0, -1.0]])
    (gradient,) = torch.autograd.grad(mask_loss(probability, torch.ones(1, 2), influence, 0.1), probability)
    assert gradient[0, 0] < 0 < gradient[0, 1]  # descent raises the first and lowers the second
