"""The losses against sums written out."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mlomae.objectives import hardness_loss, head_loss, mask_loss, pretrain_loss

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


def test_hardness_loss_is_the_mean_over_all_pairs_of_removed_patches() -> None:
    generator = torch.Generator().manual_seed(0)
    scores, errors = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    errors[0, 1] = errors[0, 0]  # equally hard
    mask = torch.tensor([[1.0, 1, 0, 1, 1], [0, 1, 1, 0, 0], [0, 0, 0, 0, 1]], dtype=torch.float64)
    losses = []
    for image, i, j in itertools.product(range(3), range(5), range(5)):
        if i == j or not mask[image, i] * mask[image, j]:
            continue
        gap = float(errors[image, i] - errors[image, j])
        target = 0.5 if gap == 0 else float(gap > 0)
        p = 1 / (1 + math.exp(float(scores[image, j] - scores[image, i])))
        losses.append(-target * math.log(p) - (1 - target) * math.log(1 - p))

    assert hardness_loss(scores, mask, errors).item() == pytest.approx(sum(losses) / len(losses))
    assert hardness_loss(torch.zeros(3, 5), mask, errors).item() == pytest.approx(math.log(2))


def test_hardness_loss_takes_the_errors_as_constants_and_ignores_kept_patches() -> None:
    scores, errors = WEIGHTS.clone().requires_grad_(), ERRORS.clone().requires_grad_()
    hardness_loss(scores, MASK, errors).backward()
    assert errors.grad is None and scores.grad is not None
    # Of each pair of removed patches the one with the larger error is raised.
    assert torch.equal(scores.grad.sign(), torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, -1.0]]))


def test_hardness_loss_of_single_patches_is_zero() -> None:
    scores = torch.zeros(2, 3, requires_grad=True)
    loss = hardness_loss(scores, torch.eye(3)[:2], ERRORS)
    loss.backward()
    assert loss.item() == 0 and scores.grad is not None and not scores.grad.any()
