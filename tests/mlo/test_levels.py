"""The levels' own steps: which weights they move, along which gradient, and to what effect."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from mlomae import objectives
from mlomae.mlo.space import perturbation
from mlomae.precision import ieee_float32, set_float32_products
from tests.mlo.problem import (
    ITERATION,
    Named,
    Problem,
    TensorStream,
    detached,
    flat,
    parameters_of,
    relative_error,
)


def _pretrain_gradient(problem: Problem, attached: bool) -> Tensor:
    """Gradient of the pretrain loss in theta, with or without the path through the masking network."""
    autoencoder, selection = problem.autoencoder, problem.masked.selection
    tokens = autoencoder.encoder.patch_embed(problem.masked.images)
    p = problem.network(tokens if attached else tokens.detach()).sigmoid()
    errors = autoencoder(problem.masked.images, selection)
    loss = objectives.pretrain_loss(errors, selection.mask, p)
    return flat(torch.autograd.grad(loss, parameters_of(autoencoder)))


def test_no_gradient_reaches_the_autoencoder_through_the_masking_network(fresh: Problem) -> None:
    expected = _pretrain_gradient(fresh, attached=False)
    # The comparison can tell the difference.
    assert relative_error(_pretrain_gradient(fresh, attached=True), expected.double()) > 1e-3
    batch = TensorStream(1).next()
    seen: list[Tensor] = []
    fresh.pretrain.engine.optimizer.register_step_pre_hook(
        lambda *_: seen.extend(p.grad for p in parameters_of(fresh.autoencoder))
    )
    masked, metrics = fresh.pretrain.step(batch, ITERATION)
    torch.testing.assert_close(masked.images, fresh.masked.images)
    torch.testing.assert_close(flat(seen), expected)
    assert all(p.grad is None for p in parameters_of(fresh.network))
    assert metrics["loss/pretrain"] < metrics["loss/reconstruction"]  # weights below 1


@pytest.mark.parametrize("level", ["pretrain", "head", "mask"])
def test_a_level_moves_its_own_weights_only(fresh: Problem, level: str) -> None:
    direction = fresh.mask.hypergradient.direction(fresh.train, fresh.heldout, ITERATION)
    modules = {"pretrain": fresh.autoencoder, "head": fresh.head.engine.module, "mask": fresh.network}
    before = {name: flat(parameters_of(module)).clone() for name, module in modules.items()}
    assert fresh.train.labels is not None
    if level == "pretrain":
        fresh.pretrain.step(fresh.train, ITERATION)
    elif level == "head":
        fresh.head.step(direction.train_features, fresh.train.labels, ITERATION)
    else:
        fresh.mask.step(fresh.masked, direction, ITERATION)
    moved = {name for name, module in modules.items() if not before[name].equal(flat(parameters_of(module)))}
    assert moved == {level}


def test_mask_of_a_batch_depends_on_its_number_and_rows_only(fresh: Problem) -> None:
    batch = TensorStream(5).next()
    first, again = fresh.pretrain.mask(batch), fresh.pretrain.mask(batch)
    assert torch.equal(first.selection.ids_keep, again.selection.ids_keep)
    later = fresh.pretrain.mask(replace(batch, number=1))
    assert not torch.equal(first.selection.ids_keep, later.selection.ids_keep)
    half = replace(batch, images=batch.images[2:], first_row=2)
    assert torch.equal(fresh.pretrain.mask(half).selection.mask, first.selection.mask[2:])


def test_frozen_tokens_do_not_follow_the_autoencoder(fresh: Problem) -> None:
    masked = fresh.pretrain.mask(fresh.train)
    assert masked.tokens is not None and masked.scores is not None
    before = masked.tokens.clone()
    fresh.pretrain.step(fresh.train, ITERATION)
    assert torch.equal(masked.tokens, before)
    assert not masked.tokens.requires_grad and not masked.scores.requires_grad


@pytest.mark.parametrize("levels", [2, 3])
def test_a_step_against_the_hypergradient_lowers_the_heldout_loss(initial: Problem, levels: int) -> None:
    """The sign and the size, end to end: mask step, pretrain step redone, held-out loss measured again."""
    # A small pretrain step, because the trainer takes influence and direction at one and the same theta.
    problem = initial.converted(
        torch.float64, levels=levels, pretrain={"lr": 1e-5}, hypergradient={"radius": 1e-6}
    )
    predicted, actual = _predicted_and_actual_change(problem, problem.hypergradient())
    assert actual < 0
    assert math.isclose(predicted, actual, rel_tol=2e-3)  # measured 6e-5


def test_the_prediction_holds_for_a_large_pretrain_step(initial: Problem) -> None:
    """With v taken after the pretrain step, as in the formula, nothing is lost at a rate of 0.1."""
    problem = initial.converted(torch.float64, pretrain={"lr": 0.1}, hypergradient={"radius": 1e-6})
    phi = detached(problem.network)
    moved = _pretrain_step(problem, phi)
    space = problem.mask.hypergradient.space
    before = space.values()
    difference = [after - b for after, b in zip(moved.values(), before, strict=True)]
    with perturbation(space, [b.clone() for b in before], difference) as move:
        move(torch.ones((), dtype=torch.float64))
        direction = problem.mask.hypergradient.direction(problem.train, problem.heldout, ITERATION)
    influence, _ = problem.mask.hypergradient.influence(problem.masked, direction)
    p = problem.network(problem.masked.tokens).sigmoid()
    lr = problem.pretrain.lr(ITERATION)
    loss = objectives.mask_loss(p, problem.masked.selection.mask, influence, lr)
    gradient = flat(torch.autograd.grad(loss, parameters_of(problem.network)))
    predicted, actual = _predicted_and_actual_change(problem, gradient)
    assert actual < 0
    assert math.isclose(predicted, actual, rel_tol=5e-3)  # measured 1.4e-3


def _predicted_and_actual_change(problem: Problem, gradient: Tensor) -> tuple[float, float]:
    """Change of the held-out loss when the masking network goes a little way against ``gradient``."""
    phi = detached(problem.network)
    length = 1e-4 * flat(phi.values()).norm()
    step = -gradient * length / gradient.norm()
    parts = step.split([value.numel() for value in phi.values()])
    ahead = {name: w + part.view_as(w) for (name, w), part in zip(phi.items(), parts, strict=True)}
    before, after = (
        problem.heldout_loss(problem.autoencoder, _pretrain_step(problem, weights)).item()
        for weights in (phi, ahead)
    )
    return float(gradient @ step), after - before


def _pretrain_step(problem: Problem, phi: Named) -> Named:
    """theta after one plain gradient step whose probabilities come from ``phi``; the selection stays."""
    theta = {name: p.requires_grad_() for name, p in detached(problem.autoencoder).items()}
    masked = problem.masked
    p = functional_call(problem.network, phi, (masked.tokens,)).sigmoid().detach()
    errors = functional_call(problem.autoencoder, theta, (masked.images, masked.selection))
    loss = objectives.pretrain_loss(errors, masked.selection.mask, p)
    grads = torch.autograd.grad(loss, list(theta.values()))
    lr = problem.pretrain.lr(ITERATION)
    return {name: (w - lr * g).detach() for (name, w), g in zip(theta.items(), grads, strict=True)}


def test_the_finite_difference_runs_without_tf32_and_leaves_the_settings_alone() -> None:
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    try:
        set_float32_products("tf32")
        with pytest.raises(KeyError), ieee_float32():
            assert [switch.fp32_precision for switch in switches] == ["ieee", "ieee"]
            raise KeyError
        assert [switch.fp32_precision for switch in switches] == ["tf32", "tf32"]
    finally:
        set_float32_products("float32")
    assert [switch.fp32_precision for switch in switches] == ["ieee", "ieee"]
