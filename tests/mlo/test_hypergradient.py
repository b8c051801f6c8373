"""The hypergradient of a real three-level problem against forward-mode differentiation in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mlomae import objectives
from mlomae.mlo.space import global_norm, perturbation
from mlomae.models.masking import MaskingNetwork
from tests.mlo.problem import ITERATION, Problem, detached, flat, parameters_of, relative_error

# Relative error at the default radius. Measured: at most 6.1e-4 at initialisation in both precisions (the
# curvature), and after training 1e-5 in float64 and 1.2e-3 in float32 (rounding).
BOUNDS = {torch.float64: 2e-3, torch.float32: 5e-3}
# Measured 2e-13: the same finite difference, summed in another order.
SAME_FORMULA = 1e-10


@pytest.mark.parametrize("levels", [2, 3])
def test_initial_hypergradient_is_exact_enough(initial: Problem, levels: int) -> None:
    _check_accuracy(initial, levels)


@pytest.mark.parametrize("levels", [2, 3])
def test_trained_hypergradient_is_exact_enough(trained: Problem, levels: int) -> None:
    _check_accuracy(trained, levels)


def _check_accuracy(problem: Problem, levels: int) -> None:
    exact = problem.converted(torch.float32, levels=levels).exact
    for dtype, bound in BOUNDS.items():
        found = problem.converted(dtype, levels=levels).hypergradient()
        assert found.dtype == dtype
        assert relative_error(found, exact) <= bound, dtype


def test_the_look_ahead_term_counts(initial: Problem) -> None:
    # Otherwise the exactness of levels=3 would say no more than that of levels=2.
    with_term = initial.converted(torch.float64, head={"lr": 1.0})
    without = initial.converted(torch.float64, levels=2)
    assert relative_error(without.exact, with_term.exact) > 0.5
    assert relative_error(with_term.hypergradient(), with_term.exact) <= BOUNDS[torch.float64]


def test_error_falls_with_the_square_of_the_radius_until_rounding(trained: Problem) -> None:
    exact = trained.converted(torch.float64).exact

    def error(radius: float) -> float:
        changed = trained.converted(torch.float64, hypergradient={"radius": radius})
        return relative_error(changed.hypergradient(), exact)

    wide, middle, narrow, tiny = (error(radius) for radius in (1e-4, 1e-5, 1e-6, 1e-11))
    assert math.isclose(wide / middle, 100, rel_tol=0.1)
    assert math.isclose(middle / narrow, 100, rel_tol=0.1)
    assert tiny > 100 * narrow  # rounding: the other branch of the V


def test_factorised_formula_equals_finite_differences_through_full_autograd(trained: Problem) -> None:
    problem = trained.converted(torch.float64, hypergradient={"radius": 1e-4})
    masked = problem.masked
    v = problem.mask.hypergradient.direction(problem.train, problem.heldout, ITERATION).values
    space = problem.mask.hypergradient.space
    eps = 1e-4 * global_norm(parameters_of(problem.autoencoder.encoder)) / space.norm(v)

    def mask_gradient() -> Tensor:
        errors = problem.autoencoder(masked.images, masked.selection)
        loss = objectives.pretrain_loss(
            errors, masked.selection.mask, problem.network(masked.tokens).sigmoid()
        )
        return flat(torch.autograd.grad(loss, parameters_of(problem.network)))

    with perturbation(space, [value.clone() for value in space.values()], v) as move:
        move(eps)
        above = mask_gradient()
        move(-eps)
        below = mask_gradient()
    expected = -problem.pretrain.lr(ITERATION) * (above - below) / (2 * eps)
    assert relative_error(problem.hypergradient(), expected) <= SAME_FORMULA


def test_direction_is_the_sum_over_both_paths(initial: Problem) -> None:
    problem = initial.converted(torch.float64, head={"lr": 1.0})
    both = problem.exact_direction()
    found = problem.mask.hypergradient.direction(problem.train, problem.heldout, ITERATION)
    expected = flat(both.values())
    assert relative_error(flat(found.values), expected) <= SAME_FORMULA
    assert all(not gradient.any() for name, gradient in both.items() if name.startswith("decoder."))
    heldout_loss = problem.heldout_loss(problem.autoencoder, detached(problem.autoencoder))
    torch.testing.assert_close(found.heldout_loss, heldout_loss.detach())


def test_hypergradient_leaves_every_weight_as_it_was(trained: Problem) -> None:
    problem = trained.converted(torch.float32)
    before = problem.weights()
    problem.hypergradient()
    assert all(torch.equal(a, b) for a, b in zip(before, problem.weights(), strict=True))
    assert all(p.grad is None for p in parameters_of(problem.autoencoder))


def test_failed_evaluation_leaves_every_weight_as_it_was(
    trained: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = trained.converted(torch.float32)
    before = problem.weights()
    evaluated: list[bool] = []

    def fail(*_: object) -> Tensor:
        evaluated.append(all(torch.equal(a, b) for a, b in zip(before, problem.weights(), strict=True)))
        raise RuntimeError("out of memory")

    monkeypatch.setattr(problem.autoencoder, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        problem.hypergradient()
    assert evaluated == [False]  # it failed while the weights were moved
    assert all(torch.equal(a, b) for a, b in zip(before, problem.weights(), strict=True))


def test_both_evaluations_see_the_same_images_and_selection(
    initial: Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = initial.converted(torch.float32)
    direction = problem.mask.hypergradient.direction(problem.train, problem.heldout, ITERATION)
    seen: list[tuple[object, ...]] = []
    problem.autoencoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs))

    def chosen_again(*_: object) -> Tensor:
        raise AssertionError("the mask is frozen: neither scored nor selected again")

    monkeypatch.setattr(problem.pretrain.policy, "keep_lowest", chosen_again)
    monkeypatch.setattr(MaskingNetwork, "forward", chosen_again)
    problem.mask.hypergradient.influence(problem.masked, direction)
    masked = problem.masked
    assert len(seen) >= 2
    assert all(images is masked.images and selection is masked.selection for images, selection in seen)


def test_zero_direction_has_no_influence_and_moves_nothing(initial: Problem) -> None:
    problem = initial.converted(torch.float32)
    direction = problem.mask.hypergradient.direction(problem.train, problem.heldout, ITERATION)
    direction.values[:] = [torch.zeros_like(value) for value in direction.values]
    influence, metrics = problem.mask.hypergradient.influence(problem.masked, direction)
    assert not influence.any() and not metrics["hypergradient/direction_norm"]
    before = problem.weights()
    problem.mask.step(problem.masked, direction, ITERATION)
    assert all(torch.equal(a, b) for a, b in zip(before, problem.weights(), strict=True))
