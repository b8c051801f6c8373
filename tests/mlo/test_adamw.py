"""An AdamW step taken apart, against steps that torch takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mlomae.distributed.recorder import StepCounter, StepRecorder
from mlomae.mlo.adamw import adamw_slope

F64 = torch.float64
BETAS, EPS, LR, DECAY = (0.9, 0.95), 1e-8, 1e-2, 0.05


def _optimizer(weight: Tensor) -> torch.optim.AdamW:
    return torch.optim.AdamW([weight], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)


def _step(start: Tensor, gradients: list[Tensor]) -> Tensor:
    """The weight after AdamW steps with these gradients."""
    weight = start.clone().requires_grad_()
    optimizer = _optimizer(weight)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_slope_is_the_derivative_of_a_step_that_torch_takes(steps: int) -> None:
    start = torch.randn(20, dtype=F64)
    gradients = [torch.randn(20, dtype=F64) for _ in range(steps)]
    weight = start.clone().requires_grad_()
    optimizer = _optimizer(weight)
    recorder = StepRecorder(optimizer, StepCounter(optimizer), [weight], slope=True)
    for number, gradient in enumerate(gradients):
        weight.grad = gradient.clone()
        if number == steps - 1:
            before = weight.detach().clone()
            with recorder:
                optimizer.step()
        else:
            optimizer.step()
    record = recorder.record(None, 0.0)
    torch.testing.assert_close(record.point()[0], before, rtol=1e-12, atol=1e-14)
    assert not torch.equal(before, weight)
    assert record.slope is not None

    # The update is -lr * u(g), element by element: differentiate it numerically in the last gradient.
    small = 1e-6
    above, below = (_step(start, [*gradients[:-1], gradients[-1] + sign * small]) for sign in (1, -1))
    numeric = -(above - below) / (2 * small) / LR
    torch.testing.assert_close(record.slope[0], numeric, rtol=1e-4, atol=2e-6)


def test_slope_is_zero_and_finite_where_no_gradient_ever_arrived() -> None:
    zeros = torch.zeros(3)
    slope = adamw_slope(zeros, zeros, zeros, 5, BETAS, 1e-3)
    assert slope.isfinite().all()


def test_recorder_leaves_no_hook_behind_and_knows_who_did_not_step() -> None:
    moved, still = (torch.randn(4, requires_grad=True) for _ in range(2))
    optimizer = torch.optim.AdamW([moved, still])
    moved.grad = torch.ones(4)
    counter = StepCounter(optimizer)
    hooks = dict(optimizer._optimizer_step_post_hooks)
    with StepRecorder(optimizer, counter, [moved, still], slope=True) as recorder:
        optimizer.step()
    record = recorder.record(None, 0.0)
    assert record.slope is not None
    point = record.point()
    assert torch.equal(point[1], still.detach()) and not record.slope[1].any()
    assert not torch.equal(point[0], moved.detach())
    assert optimizer._optimizer_step_post_hooks == hooks
    assert (counter.number(moved), counter.number(still)) == (1, 0)


def test_point_of_a_float32_step_is_right_to_rounding() -> None:
    weight = torch.randn(1000, requires_grad=True)
    optimizer = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1)
    counter = StepCounter(optimizer)
    for _ in range(4):
        weight.grad = torch.randn(1000)
        before = weight.detach().clone()
        with StepRecorder(optimizer, counter, [weight], slope=False) as recorder:
            optimizer.step()
    record = recorder.record(None, 0.0)
    assert record.slope is None
    assert float((record.point()[0] - before).norm() / before.norm()) < 2e-7
