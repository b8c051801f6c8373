"""Perturbation and every estimator of the influence on problems with closed forms: no network."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mlomae.mlo.estimators import ESTIMATORS
from mlomae.mlo.influence import PatchErrors, unit_step
from mlomae.mlo.space import TensorSpace, global_norm, perturbation
from mlomae.objectives import mask_loss, pretrain_loss

F64 = torch.float64


def space_of(*parameters: Tensor) -> TensorSpace:
    return TensorSpace({str(i): p for i, p in enumerate(parameters)}, "", list)


def errors_of(
    theta: Tensor, function: Callable[[Tensor], Tensor], point: Tensor | None = None, known: bool = False
) -> PatchErrors:
    """``function`` [n] → [B, L] as per-patch errors of the weights ``theta``, or around another point."""
    base = theta if point is None else point
    return PatchErrors(
        space_of(theta),
        None if point is None else [point],
        function(base).detach() if known else None,
        lambda: function(theta),
        lambda weights: function(weights["0"]),
    )


def influence(name: str, errors: PatchErrors, v: Tensor, radius: float = 1e-4) -> Tensor:
    return ESTIMATORS[name](errors, [v], radius * unit_step(errors.space, [v])[0])


def test_perturbation_moves_from_the_point_and_restores_bitwise() -> None:
    parameters = [torch.randn(3, 4), torch.randn(5)]
    point = [torch.randn(3, 4), torch.randn(5)]
    direction = [torch.randn(3, 4), torch.randn(5)]
    originals = [p.clone() for p in parameters]
    eps = torch.tensor(0.3)
    with perturbation(space_of(*parameters), point, direction) as move:
        for sign in (1, -1, 1):  # each move starts at the point: moves do not add up
            move(sign * eps)
            for p, base, v in zip(parameters, point, direction, strict=True):
                torch.testing.assert_close(p, base + sign * eps * v)
    assert all(torch.equal(p, o) for p, o in zip(parameters, originals, strict=True))


def test_perturbation_restores_parameters_that_require_gradients_after_an_exception() -> None:
    parameter = torch.nn.Parameter(torch.randn(4))
    original = parameter.detach().clone()
    space = space_of(parameter)
    with pytest.raises(ZeroDivisionError), perturbation(space, [original], [torch.ones(4)]) as move:
        move(torch.tensor(1.0))
        assert not torch.equal(parameter, original)
        raise ZeroDivisionError
    assert torch.equal(parameter, original)
    assert parameter.requires_grad and parameter.is_leaf


def test_global_norm_is_that_of_the_concatenation() -> None:
    tensors = [torch.randn(3, 4), torch.randn(5), torch.zeros(2)]
    torch.testing.assert_close(global_norm(tensors), torch.cat([t.flatten() for t in tensors]).norm())


def test_a_space_moves_the_weights_of_its_prefix_only() -> None:
    moved, still = (torch.randn(3, 2, dtype=F64).requires_grad_() for _ in range(2))
    space = TensorSpace({"encoder.w": moved, "decoder.w": still}, "encoder.", list)
    v = space.gradient((2 * moved).sum(), torch.ones((), dtype=F64))
    torch.testing.assert_close(v[0], torch.full_like(moved, 2))
    assert v[1].shape == still.shape and not v[1].any()
    torch.testing.assert_close(space.norm(v), v[0].norm())
    torch.testing.assert_close(space.scale(), moved.detach().norm())


def test_radius_is_relative_to_the_weights_and_independent_of_the_length_of_v() -> None:
    theta, v = torch.randn(50, dtype=F64), torch.randn(50, dtype=F64)
    original = theta.clone()
    distances: list[float] = []

    def function(weights: Tensor) -> Tensor:
        distances.append(float((weights - original).norm() / original.norm()))
        return (weights**2).view(5, 10)

    once = influence("fd", errors_of(theta, function), v, 1e-3)
    tenfold = influence("fd", errors_of(theta, function), 10 * v, 1e-3)
    assert all(math.isclose(distance, 1e-3, rel_tol=1e-9) for distance in distances)
    assert len(distances) == 4
    torch.testing.assert_close(tenfold, 10 * once)


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize(
    ("name", "bound"), [("fd", 1e-7), ("fd-forward", 1e-3), ("jvp", 1e-14), ("exact", 1e-14)]
)
def test_every_estimator_finds_the_derivative_and_leaves_the_weights_alone(
    name: str, bound: float, elsewhere: bool
) -> None:
    theta, v = torch.randn(6, dtype=F64), torch.randn(6, dtype=F64)
    point = torch.randn(6, dtype=F64) if elsewhere else None
    before = theta.clone()
    found = influence(name, errors_of(theta, lambda w: w.exp().view(2, 3), point, known=elsewhere), v)
    expected = ((theta if point is None else point).exp() * v).view(2, 3)
    assert float((found - expected).norm() / expected.norm()) < bound
    assert torch.equal(theta, before)
    assert not found.requires_grad


def test_central_difference_is_exact_for_quadratic_errors() -> None:
    theta, v, centre = (torch.randn(6, dtype=F64) for _ in range(3))
    found = influence("fd", errors_of(theta, lambda w: (0.5 * (w - centre) ** 2).view(2, 3)), v, 0.1)
    torch.testing.assert_close(found, ((theta - centre) * v).view(2, 3))


@pytest.mark.parametrize(("known", "evaluations"), [(True, 1), (False, 2)])
def test_forward_difference_evaluates_what_it_does_not_know(known: bool, evaluations: int) -> None:
    theta, v = torch.randn(6, dtype=F64), torch.randn(6, dtype=F64)
    calls: list[Tensor] = []

    def function(weights: Tensor) -> Tensor:
        calls.append(weights)
        return weights.exp().view(2, 3)

    errors = errors_of(theta, function, known=known)
    calls.clear()
    influence("fd-forward", errors, v)
    assert len(calls) == evaluations


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_direction_gives_zero_influence(name: str, dtype: torch.dtype) -> None:
    theta = torch.randn(6, dtype=dtype)
    errors = errors_of(theta, lambda w: w.exp().view(2, 3), theta.clone(), known=True)
    found = influence(name, errors, torch.zeros(6, dtype=dtype))
    assert torch.equal(found, torch.zeros(2, 3, dtype=dtype))


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_tiny_direction_gives_finite_influence(name: str) -> None:
    # Squares of these underflow in float32; the result may lose accuracy but not become NaN.
    theta = torch.randn(6)
    found = influence(name, errors_of(theta, lambda w: w.exp().view(2, 3)), torch.full((6,), 1e-30))
    assert found.isfinite().all()


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

    ahead = theta - lr * (mask * p.detach() * a * (theta - b)).sum() / mask.sum()
    v = ahead - y
    found_influence = influence("fd", errors_of(theta, lambda w: 0.5 * a * (w - b) ** 2), v, 1e-2)
    (found,) = torch.autograd.grad(mask_loss(p, mask, found_influence, lr), p)
    torch.testing.assert_close(found, -lr * v * mask * a * (theta - b) / mask.sum())

    # And the closed form is what autograd finds when it differentiates through the step itself.
    weight = theta.clone().requires_grad_()
    loss = pretrain_loss(0.5 * a * (weight - b) ** 2, mask, p)
    (step,) = torch.autograd.grad(loss, weight, create_graph=True)
    (exact,) = torch.autograd.grad((0.5 * (weight - lr * step - y) ** 2).sum(), p)
    torch.testing.assert_close(found, exact)
