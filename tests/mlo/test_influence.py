"""Perturbation and influence on problems with closed forms: tensors and functions only, no network."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mlomae.mlo.influence import central_difference
from mlomae.mlo.perturb import global_norm, perturbation
from mlomae.objectives import mask_loss, pretrain_loss

F64 = torch.float64


def test_perturbation_moves_from_the_originals_and_restores_them_bitwise() -> None:
    parameters = [torch.randn(3, 4), torch.randn(5)]
    direction = [torch.randn(3, 4), torch.randn(5)]
    originals = [p.clone() for p in parameters]
    eps = torch.tensor(0.3)
    with perturbation(parameters, direction) as move:
        for sign in (1, -1, 1):  # each move starts at the originals: moves do not add up
            move(sign * eps)
            for p, original, v in zip(parameters, originals, direction, strict=True):
                torch.testing.assert_close(p, original + sign * eps * v)
    assert all(torch.equal(p, o) for p, o in zip(parameters, originals, strict=True))


def test_perturbation_restores_parameters_that_require_gradients_after_an_exception() -> None:
    parameter = torch.nn.Parameter(torch.randn(4))
    original = parameter.detach().clone()
    with pytest.raises(ZeroDivisionError), perturbation([parameter], [torch.ones(4)]) as move:
        move(torch.tensor(1.0))
        assert not torch.equal(parameter, original)
        raise ZeroDivisionError
    assert torch.equal(parameter, original)
    assert parameter.requires_grad and parameter.is_leaf


def test_global_norm_is_that_of_the_concatenation() -> None:
    tensors = [torch.randn(3, 4), torch.randn(5), torch.zeros(2)]
    torch.testing.assert_close(global_norm(tensors), torch.cat([t.flatten() for t in tensors]).norm())


def test_radius_is_relative_to_the_weights_and_independent_of_the_length_of_v() -> None:
    theta, v = torch.randn(50, dtype=F64), torch.randn(50, dtype=F64)
    original = theta.clone()
    distances: list[float] = []

    def errors() -> Tensor:
        distances.append(float((theta - original).norm() / original.norm()))
        return (theta**2).view(5, 10)

    once = central_difference(errors, [theta], [v], 1e-3)
    tenfold = central_difference(errors, [theta], [10 * v], 1e-3)
    assert all(math.isclose(distance, 1e-3, rel_tol=1e-9) for distance in distances)
    assert len(distances) == 4
    torch.testing.assert_close(tenfold.values, 10 * once.values)
    torch.testing.assert_close(once.direction_norm, v.norm())


def test_influence_is_exact_for_quadratic_errors() -> None:
    theta, v, centre = (torch.randn(6, dtype=F64) for _ in range(3))
    found = central_difference(lambda: (0.5 * (theta - centre) ** 2).view(2, 3), [theta], [v], 0.1)
    torch.testing.assert_close(found.values, ((theta - centre) * v).view(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_direction_gives_zero_influence(dtype: torch.dtype) -> None:
    theta = torch.randn(6, dtype=dtype)
    found = central_difference(lambda: theta.exp().view(2, 3), [theta], [torch.zeros(6, dtype=dtype)], 1e-4)
    assert torch.equal(found.values, torch.zeros(2, 3, dtype=dtype))


def test_tiny_direction_gives_finite_influence() -> None:
    # Squares of these underflow in float32; the result may lose accuracy but not become NaN.
    theta = torch.randn(6)
    found = central_difference(lambda: theta.exp().view(2, 3), [theta], [torch.full((6,), 1e-30)], 1e-4)
    assert found.values.isfinite().all()


def test_evaluations_build_no_graph() -> None:
    theta = torch.nn.Parameter(torch.randn(6))
    found = central_difference(lambda: theta.exp().view(2, 3), [theta], [torch.ones(6)], 1e-4)
    assert not found.values.requires_grad


def test_scalar_quadratic_has_the_closed_form_hypergradient() -> None:
    """One weight theta, patch errors a_i (theta - b_i)^2 / 2, probabilities p_i, L_val = (theta' - y)^2 / 2.

    With theta' = theta - lr * sum_i m_i p_i a_i (theta - b_i) / M the chain rule gives
    dL_val / dp_i = -lr * (theta' - y) * m_i a_i (theta - b_i) / M.
    """
    theta = torch.tensor([0.7], dtype=F64)
    a = torch.tensor([[1.0, 2.0, 0.5, 3.0]], dtype=F64)
    b = torch.tensor([[0.3, -1.0, 2.0, 0.1]], dtype=F64)
    p = torch.tensor([[0.2, 0.9, 0.5, 0.6]], dtype=F64, requires_grad=True)
    mask = torch.tensor([[1.0, 0.0, 1.0, 1.0]], dtype=F64)
    y, lr = -0.4, 0.3

    def errors() -> Tensor:
        return 0.5 * a * (theta - b) ** 2

    ahead = theta - lr * (mask * p.detach() * a * (theta - b)).sum() / mask.sum()
    v = ahead - y
    influence = central_difference(errors, [theta], [v], 1e-2).values
    (found,) = torch.autograd.grad(mask_loss(p, mask, influence, lr), p)
    torch.testing.assert_close(found, -lr * v * mask * a * (theta - b) / mask.sum())

    # And the closed form is what autograd finds when it differentiates through the step itself.
    weight = theta.clone().requires_grad_()
    loss = pretrain_loss(0.5 * a * (weight - b) ** 2, mask, p)
    (step,) = torch.autograd.grad(loss, weight, create_graph=True)
    (exact,) = torch.autograd.grad((0.5 * (weight - lr * step - y) ** 2).sum(), p)
    torch.testing.assert_close(found, exact)
