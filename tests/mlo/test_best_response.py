"""Newton's method of the head that is trained to optimality, on losses whose steps can be written down."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mlomae.mlo.best_response import HeadProblem, Weights, _Proximal

BATCH = (torch.zeros(1, 1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64))


def solve(
    loss: Callable[[Tensor], Tensor], start: list[float], damping: float
) -> tuple[Tensor, list[Tensor]]:
    """The optimum, and where the loss was evaluated on the way."""
    seen: list[Tensor] = []

    def noted(weights: Weights, features: Tensor, labels: Tensor) -> Tensor:
        seen.append(weights["w"].detach().clone())
        return loss(weights["w"])

    weights = {"w": torch.tensor(start, dtype=torch.float64)}
    problem = _Proximal(HeadProblem(noted, weights, "implicit", 0.1, damping), BATCH, lambda tensors: tensors)
    problem.solve()
    return problem.weights["w"].detach(), seen


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_a_quadratic_takes_whole_steps_at_any_scale(scale: float) -> None:
    hessian = torch.diag(torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)) + 0.5
    goal = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)

    def loss(w: Tensor) -> Tensor:
        return scale * ((w - goal) @ hessian @ (w - goal)) / 2

    found, seen = solve(loss, [0.0, 0.0, 0.0], damping=0.1 * scale)
    shifted = hessian + 0.1 * torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(found, torch.linalg.solve(shifted, hessian @ goal), rtol=1e-9, atol=0)
    # At the start, after the step, and perhaps after what conjugate gradients have left of it.
    assert len(seen) <= 3


def test_a_step_is_halved_until_it_lowers_the_loss() -> None:
    # Newton's step from u is u (1 + u²), which ends at -u³.
    found, seen = solve(lambda w: (1 + w.square()).sqrt().sum(), [2.0], damping=1e-9)
    torch.testing.assert_close(
        torch.cat(seen[:4]), torch.tensor([2.0, -8.0, -3.0, -0.5], dtype=torch.float64), rtol=1e-6, atol=0
    )
    assert abs(float(found)) < 1e-6


def test_where_no_step_lowers_the_loss_it_stays() -> None:
    rises = iter(range(0, 1000, 10))
    found, seen = solve(lambda w: w.square().sum() + next(rises), [2.0], damping=1e-9)
    assert found.tolist() == [2.0]
    assert [float(w) for w in seen] == pytest.approx([2.0, *(2 - 2 / 2**n for n in range(10)), 2.0], abs=1e-6)
