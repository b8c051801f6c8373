"""Every estimator on a real three-level problem, and the hypergradient of the step that really was taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import cosine_similarity

from mlomae import objectives
from mlomae.data.batches import Batch
from mlomae.distributed.engine import TorchEngine
from mlomae.hypergradient import START_RADIUS
from mlomae.models.attention import using_attention
from tests.mlo.conftest import TRAINING_STEPS
from tests.mlo.problem import (
    ITERATION,
    Problem,
    TensorStream,
    build_problem,
    detached,
    flat,
    parameters_of,
    relative_error,
)

# Largest relative errors measured at initialisation and after training, times about three.
BOUNDS = {
    torch.float64: {"fd": 2e-3, "fd-forward": 3e-2, "jvp": 1e-10, "exact": 1e-10},
    torch.float32: {"fd": 5e-3, "fd-forward": 6e-2, "jvp": 1e-4, "exact": 1e-4},
}


@pytest.fixture(scope="module", params=[0, TRAINING_STEPS])
def problem(request: pytest.FixtureRequest) -> Problem:
    """Not to be changed: use ``converted``."""
    return build_problem(request.param)


@pytest.mark.parametrize("name", ["fd-forward", "jvp", "exact"])
def test_estimator_is_exact_enough(problem: Problem, name: str) -> None:
    exact = problem.converted(torch.float32).exact
    for dtype, bounds in BOUNDS.items():
        changed = problem.converted(dtype, hypergradient={"estimator": name})
        before = changed.weights()
        assert relative_error(changed.hypergradient(), exact) <= bounds[name], dtype
        assert all(torch.equal(a, b) for a, b in zip(before, changed.weights(), strict=True))


def test_default_under_bf16_autocast(problem: Problem) -> None:
    exact = problem.converted(torch.float32).exact
    found = problem.converted(torch.float32, mixed=True)
    assert found.mask.hypergradient.estimator == "jvp"
    cosine = cosine_similarity(found.hypergradient().double(), exact, dim=0)
    assert cosine > 0.99  # measured 0.997 and above


@pytest.mark.parametrize("name", ["fd", "fd-forward"])
def test_finite_differences_in_bf16_follow_their_error(problem: Problem, name: str) -> None:
    found = problem.converted(
        torch.float32, mixed=True, hypergradient={"estimator": name, "precision": "engine"}
    )
    exact = problem.converted(torch.float32).exact
    error = relative_error(found.hypergradient(), exact)
    radius = found.mask.hypergradient.radius
    # bf16 drowns what float32 resolves: a far larger radius is found, and the estimate tells what it leaves.
    assert radius.value > 1e-4
    assert radius.error is not None and radius.error > 1e-2
    # Measured: 0.15 to 1 times the estimate, which few numbers of bf16 leave coarse.
    assert radius.error / 10 < error < 2 * radius.error
    at_float32s_radius = problem.converted(
        torch.float32,
        mixed=True,
        hypergradient={"estimator": name, "precision": "engine", "radius": START_RADIUS[name]},
    )
    assert error < relative_error(at_float32s_radius.hypergradient(), exact)


def test_implicit_response_is_right_on_the_real_problem(initial: Problem) -> None:
    """Against the one-step answer iterated to the optimum, with autograd through every iteration."""
    damping = 0.5
    problem = initial.converted(
        torch.float64, hypergradient={"best_response": "implicit", "damping": damping}, head={"lr": 1.0}
    )
    hypergradient = problem.mask.hypergradient
    found = hypergradient.direction(problem.train, problem.heldout, ITERATION)

    head = problem.head.problem(ITERATION)
    train, heldout = (hypergradient.features(batch.images) for batch in (problem.train, problem.heldout))
    assert problem.train.labels is not None and problem.heldout.labels is not None
    ahead = {name: w.clone().requires_grad_() for name, w in head.weights.items()}
    for _ in range(1500):
        away = torch.stack([(ahead[name] - w).square().sum() for name, w in head.weights.items()]).sum()
        loss = head.loss(ahead, train, problem.train.labels) + damping / 2 * away
        grads = torch.autograd.grad(loss, list(ahead.values()), create_graph=True)
        ahead = {name: w - 0.02 * g for (name, w), g in zip(ahead.items(), grads, strict=True)}
    loss = head.loss(ahead, heldout, problem.heldout.labels)
    expected = torch.autograd.grad(loss, parameters_of(problem.autoencoder.encoder))
    torch.testing.assert_close(found.heldout_loss, loss.detach())
    moved = found.values[: len(expected)]
    assert relative_error(flat(moved), flat(expected)) < 1e-5


@pytest.mark.parametrize("levels", [2, 3])
@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_with_adam_it_is_the_derivative_through_the_step_that_was_taken(levels: int, clip: float) -> None:
    """Against autograd through a whole AdamW step of the autoencoder and the head's look-ahead step."""
    settings = {"estimator": "jvp", "precondition": "adam"}
    pretrain = {"clip": clip, "eps": 1e-4}
    problem = build_problem(0, levels=levels, hypergradient=settings, pretrain=pretrain).converted(
        torch.float64
    )
    stream = TensorStream(7)

    def batch() -> Batch:
        narrow = stream.next()
        return replace(narrow, images=narrow.images.double())

    problem.pretrain.step(batch(), ITERATION)
    engine = problem.pretrain.engine
    assert isinstance(engine, TorchEngine)
    optimizer = engine.optimizer
    theta = detached(problem.autoencoder)
    state = {
        name: {key: value.clone() for key, value in optimizer.state[p].items()}
        for name, p in problem.autoencoder.named_parameters()
        if p in optimizer.state
    }
    problem.masked, _ = problem.pretrain.step(batch(), ITERATION, record=True)

    found = problem.hypergradient()
    expected = _through_adamw(problem, theta, state, clip)
    assert relative_error(found, expected) < 1e-8  # measured 1e-12 without clipping
    # Taken as plain gradient descent after the step, another gradient is found.
    problem.masked = replace(problem.masked, step=None)
    assert relative_error(problem.hypergradient(), expected) > 0.1


def _through_adamw(
    problem: Problem, theta: dict[str, Tensor], state: dict[str, dict[str, Tensor]], clip: float
) -> Tensor:
    rates, lr = problem.config.pretrain, problem.pretrain.lr(ITERATION)
    module, network, masked = problem.autoencoder, problem.network, problem.masked
    phi = {name: p.requires_grad_() for name, p in detached(network).items()}
    leaves = {name: w.clone().requires_grad_() for name, w in theta.items()}
    with using_attention(module, "reference"):
        errors = functional_call(module, leaves, (masked.images, masked.selection))
        p = functional_call(network, phi, (masked.tokens,)).sigmoid()
        loss = objectives.pretrain_loss(errors, masked.selection.mask, p)
        gradients = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        if clip:
            norm = torch.stack([g.detach().square().sum() for g in gradients]).sum().sqrt()
            gradients = tuple(g * torch.clamp(clip / (norm + 1e-6), max=1.0) for g in gradients)
        ahead = {}
        for (name, w), g in zip(theta.items(), gradients, strict=True):
            moments, step = state[name], int(state[name]["step"]) + 1
            first = rates.betas[0] * moments["exp_avg"] + (1 - rates.betas[0]) * g
            second = rates.betas[1] * moments["exp_avg_sq"] + (1 - rates.betas[1]) * g * g
            # The tiny number keeps the root differentiable where no gradient arrived.
            root = (second / (1 - rates.betas[1] ** step) + 1e-40).sqrt() + rates.eps
            decayed = dict(module.named_parameters())[name].ndim >= 2 and not name.endswith("_token")
            decay = rates.weight_decay if decayed else 0.0
            ahead[name] = w * (1 - lr * decay) - lr * first / (1 - rates.betas[0] ** step) / root
        heldout_loss = problem.heldout_loss(module, ahead)
        return flat(torch.autograd.grad(heldout_loss, list(phi.values())))
