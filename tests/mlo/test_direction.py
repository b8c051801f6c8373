"""The direction v on a tiny encoder, against autograd through everything, on one rank and on two."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mlomae.mlo.best_response import HeadProblem, Weights, feature_cotangents
from mlomae.mlo.direction import Direction, encoder_direction
from mlomae.mlo.space import TensorSpace

F64 = torch.float64
CLASSES, WIDTH, BATCH = 3, 5, 8
LR = 0.7
DAMPING = 0.05
Labelled = tuple[Tensor, Tensor]


def _head_loss(weights: Weights, features: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(features @ weights["matrix"].T + weights["bias"], labels)


def _alone(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list(tensors)


@pytest.fixture
def encoder() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, WIDTH)).to(F64)


@pytest.fixture
def weights() -> Weights:
    return {"matrix": torch.randn(CLASSES, WIDTH, dtype=F64), "bias": torch.randn(CLASSES, dtype=F64)}


@pytest.fixture
def batches() -> tuple[Labelled, Labelled]:
    def batch() -> Labelled:
        return torch.randn(BATCH, 4, dtype=F64), torch.randint(CLASSES, (BATCH,))

    return batch(), batch()


def _direction(
    encoder: nn.Module,
    head: HeadProblem,
    batches: tuple[Labelled, Labelled],
    average: Callable[[list[Tensor]], list[Tensor]] = _alone,
) -> Direction:
    space = TensorSpace(dict(encoder.named_parameters()), "", average)
    return encoder_direction(encoder, space, head, *batches, average)


def _problem(weights: Weights, response: str, lr: float = LR) -> HeadProblem:
    return HeadProblem(_head_loss, weights, response, lr, DAMPING)


def _look_ahead(weights: Weights, features: Tensor, labels: Tensor) -> Weights:
    leaves = {name: w.clone().requires_grad_() for name, w in weights.items()}
    grads = torch.autograd.grad(
        _head_loss(leaves, features, labels), list(leaves.values()), create_graph=True
    )
    return {name: w - LR * g for (name, w), g in zip(leaves.items(), grads, strict=True)}


def test_two_level_direction_is_the_heldout_gradient(
    encoder: nn.Module, weights: Weights, batches: tuple[Labelled, Labelled]
) -> None:
    train, heldout = batches
    found = _direction(encoder, _problem(weights, "frozen"), batches)
    loss = _head_loss(weights, encoder(heldout[0]), heldout[1])
    torch.testing.assert_close(found.values, list(torch.autograd.grad(loss, list(encoder.parameters()))))
    torch.testing.assert_close(found.heldout_loss, loss.detach())
    torch.testing.assert_close(found.train_features, encoder(train[0]).detach())


def test_three_level_direction_is_the_sum_of_both_paths(
    encoder: nn.Module, weights: Weights, batches: tuple[Labelled, Labelled]
) -> None:
    (train_x, train_y), (heldout_x, heldout_y) = batches
    parameters = list(encoder.parameters())
    found = _direction(encoder, _problem(weights, "one-step"), batches)

    def path(train_features: Tensor, heldout_features: Tensor) -> list[Tensor]:
        ahead = _look_ahead(weights, train_features, train_y)
        return list(torch.autograd.grad(_head_loss(ahead, heldout_features, heldout_y), parameters))

    train_features, heldout_features = encoder(train_x), encoder(heldout_x)
    through_heldout = path(train_features.detach(), heldout_features)
    through_head = path(encoder(train_x), heldout_features.detach())
    both = path(encoder(train_x), encoder(heldout_x))
    sums = [a + b for a, b in zip(through_heldout, through_head, strict=True)]
    torch.testing.assert_close(found.values, sums)
    torch.testing.assert_close(found.values, both)
    assert all(part.abs().max() > 1e-3 for part in (*through_heldout, *through_head))


def test_cotangents_of_a_scalar_head_have_the_closed_form() -> None:
    """Loss (w f - y)^2 / 2 and one look-ahead step w' = w - lr (w f_t - y_t) f_t."""

    def loss(weights: Weights, features: Tensor, target: Tensor) -> Tensor:
        return 0.5 * ((weights["w"] * features).sum() - target.sum()) ** 2

    w, f_t, y_t, f_h, y_h = 0.8, 1.5, -0.5, 0.6, 0.9

    def scalar(value: float) -> Tensor:
        return torch.full((1, 1), value, dtype=F64)

    head = HeadProblem(loss, {"w": scalar(w)}, "one-step", LR, DAMPING)
    found = feature_cotangents(head, (scalar(f_t), scalar(y_t)), (scalar(f_h), scalar(y_h)), _alone)
    ahead = w - LR * (w * f_t - y_t) * f_t
    residual = ahead * f_h - y_h
    assert found.train is not None
    torch.testing.assert_close(found.heldout, scalar(residual * ahead))
    torch.testing.assert_close(found.train, scalar(residual * f_h * -LR * (2 * w * f_t - y_t)))
    torch.testing.assert_close(found.loss, torch.tensor(0.5 * residual**2, dtype=F64))


def test_without_a_step_of_the_head_both_levels_agree(
    encoder: nn.Module, weights: Weights, batches: tuple[Labelled, Labelled]
) -> None:
    two, three = (
        _direction(encoder, _problem(weights, response, 0.0), batches) for response in ("frozen", "one-step")
    )
    torch.testing.assert_close(two.values, three.values)


def test_direction_changes_no_gradient_and_no_weight(
    encoder: nn.Module, weights: Weights, batches: tuple[Labelled, Labelled]
) -> None:
    kept = {name: weight.clone() for name, weight in weights.items()}
    _direction(encoder, _problem(weights, "one-step"), batches)
    assert all(p.grad is None for p in encoder.parameters())
    assert all(torch.equal(weights[name], kept[name]) for name in kept)
    assert not any(weight.requires_grad for weight in weights.values())


def _optimum(weights: Weights, features: Tensor, labels: Tensor) -> Weights:
    """The proximal optimum by plain gradient descent, differentiable in the features."""
    ahead = {name: w.clone().requires_grad_() for name, w in weights.items()}
    for _ in range(3000):
        away = sum((ahead[name] - weights[name]).square().sum() for name in weights)
        loss = _head_loss(ahead, features, labels) + DAMPING / 2 * away
        grads = torch.autograd.grad(loss, list(ahead.values()), create_graph=True)
        ahead = {name: w - 0.5 * g for (name, w), g in zip(ahead.items(), grads, strict=True)}
    assert max(g.abs().max() for g in grads) < 1e-10
    return ahead


def test_implicit_response_is_that_of_a_head_trained_to_optimality(
    weights: Weights, batches: tuple[Labelled, Labelled]
) -> None:
    features = [torch.randn(BATCH, WIDTH, dtype=F64).requires_grad_() for _ in batches]
    labels = [y for _, y in batches]
    ahead = _optimum(weights, features[0], labels[0])
    expected_loss = _head_loss(ahead, features[1], labels[1])
    expected = torch.autograd.grad(expected_loss, features)

    found = feature_cotangents(
        _problem(weights, "implicit"), (features[0], labels[0]), (features[1], labels[1]), _alone
    )

    assert found.train is not None
    torch.testing.assert_close(found.loss, expected_loss.detach())
    # Measured 8e-8: where conjugate gradients stop.
    torch.testing.assert_close([found.train, found.heldout], list(expected), rtol=1e-5, atol=1e-6)
    assert expected[0].abs().max() > 1e-3


class _TwoRanks:
    """The mean over two threads: each passes its tensors and receives the mean of both."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=30)
        self._parts: dict[int, list[Tensor]] = {}

    def average_of(self, rank: int) -> Callable[[list[Tensor]], list[Tensor]]:
        def average(tensors: list[Tensor]) -> list[Tensor]:
            self._parts[rank] = tensors
            self._barrier.wait()
            pairs = zip(self._parts[0], self._parts[1], strict=True)
            mean = [(a.detach() + b.detach()) / 2 for a, b in pairs]
            self._barrier.wait()  # neither rank overwrites its part before both have read
            return mean

        return average


@pytest.mark.parametrize("response", ["frozen", "one-step", "implicit"])
def test_two_ranks_with_half_batches_equal_one_rank(
    encoder: nn.Module, weights: Weights, batches: tuple[Labelled, Labelled], response: str
) -> None:
    head = _problem(weights, response)
    whole = _direction(encoder, head, batches)
    ranks = _TwoRanks()

    def of_rank(rank: int) -> Direction:
        rows = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
        train, heldout = ((x[rows], y[rows]) for x, y in batches)
        return _direction(encoder, head, (train, heldout), ranks.average_of(rank))

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(of_rank, (0, 1))
    assert all(torch.equal(a, b) for a, b in zip(first.values, second.values, strict=True))
    torch.testing.assert_close(first.values, whole.values)
    torch.testing.assert_close((first.heldout_loss + second.heldout_loss) / 2, whole.heldout_loss)
    torch.testing.assert_close(torch.cat([first.train_features, second.train_features]), whole.train_features)
