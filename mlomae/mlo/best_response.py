"""How the head answers the encoder: cotangents of the held-out loss on the features of both batches.

The held-out loss is a function of the features F_t (train) and F_h (held-out) alone,
L_val(F_h, w'(F_t)). The head is tiny, so its derivatives are taken exactly and cost nothing next to the
encoder. Three answers w':

* ``frozen``     w' = w: the encoder moves, the head does not.
* ``one_step``   w' = w - lr * grad_w L_tr(F_t, w): one look-ahead step (Guo et al. 2025).
* ``implicit``   w' = argmin_u L_tr(F_t, u) + damping / 2 * ||u - w||²: the head trained to optimality, kept
  near w so that the answer is unique; differentiated by the implicit function theorem (Rajeswaran et
  al. 2019).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mlomae.mlo.space import Reduce

Weights = dict[str, Tensor]
Loss = Callable[[Weights, Tensor, Tensor], Tensor]
"""Loss of (head weights, features [B, D], labels [B]): a mean over the batch."""
Batch = tuple[Tensor, Tensor]
"""Features [B, D] and labels [B] of this rank."""

# Newton steps and conjugate-gradient steps per solution. Softmax regression needs fewer than ten of the
# former; the latter stop early, at a residual that no longer matters in float32.
NEWTON_STEPS, CG_STEPS, CG_TOLERANCE = 20, 100, 1e-7


@dataclass(frozen=True)
class HeadProblem:
    """Level 2 as seen from level 3.

    Attributes:
        loss: the head's loss as a function of its weights.
        weights: the head's present weights, by name.
        response: ``frozen``, ``one-step`` or ``implicit``.
        lr: step size of the look-ahead step.
        damping: of ``implicit``.
    """

    loss: Loss
    weights: Weights
    response: str
    lr: float
    damping: float


@dataclass(frozen=True)
class Cotangents:
    """``train`` and ``heldout``: [B, D] cotangents on the features; ``loss``: L_val(F_h, w'), 0-dim."""

    train: Tensor | None
    heldout: Tensor
    loss: Tensor


def feature_cotangents(head: HeadProblem, train: Batch, heldout: Batch, average: Reduce) -> Cotangents:
    """Exact cotangents of the held-out loss on the features of both batches.

    Args:
        head: the head's loss, weights and answer.
        train: features [B, D] and labels [B] of the train batch on this rank.
        heldout: the same of the held-out batch.
        average: mean over ranks. The head's gradients are averaged before use, so that w' is the
            same on every rank; the cotangents belong to this rank's images.
    """
    return RESPONSES[head.response](head, _leaf(train), _leaf(heldout), average)


def _leaf(batch: Batch) -> Batch:
    return batch[0].detach().requires_grad_(), batch[1]


def _frozen(head: HeadProblem, train: Batch, heldout: Batch, average: Reduce) -> Cotangents:
    loss = head.loss(head.weights, *heldout)
    (cotangent,) = torch.autograd.grad(loss, heldout[0])
    return Cotangents(None, cotangent, loss.detach())


def _one_step(head: HeadProblem, train: Batch, heldout: Batch, average: Reduce) -> Cotangents:
    weights = _leaves(head.weights)
    grads = torch.autograd.grad(head.loss(weights, *train), list(weights.values()), create_graph=True)
    mean_grads = average([grad.detach() for grad in grads])
    ahead = _leaves(_add(weights, mean_grads, -head.lr))
    loss, cotangent, ahead_grads = _heldout(head, ahead, heldout, average)
    (mixed,) = torch.autograd.grad(_dot(grads, ahead_grads), train[0])
    return Cotangents(-head.lr * mixed, cotangent, loss)


def _implicit(head: HeadProblem, train: Batch, heldout: Batch, average: Reduce) -> Cotangents:
    optimum = _Proximal(head, train, average)
    optimum.solve()
    loss, cotangent, heldout_grads = _heldout(head, optimum.weights, heldout, average)
    # dL_val / dF_t = -d/dF_t [ grad_w L_tr(F_t, w') . z ] with (H + damping) z = grad_w' L_val
    z = optimum.divide(heldout_grads)
    grads = torch.autograd.grad(
        head.loss(optimum.weights, *train), list(optimum.weights.values()), create_graph=True
    )
    (mixed,) = torch.autograd.grad(_dot(grads, z), train[0])
    return Cotangents(-mixed, cotangent, loss)


RESPONSES: dict[str, Callable[[HeadProblem, Batch, Batch, Reduce], Cotangents]] = {
    "frozen": _frozen,
    "one-step": _one_step,
    "implicit": _implicit,
}


class _Proximal:
    """``L_tr(F_t, u) + damping / 2 * ||u - w||²`` over all ranks, its optimum and its Hessian."""

    def __init__(self, head: HeadProblem, train: Batch, average: Reduce) -> None:
        self.weights = _leaves(head.weights)
        self._start = [weight.detach() for weight in head.weights.values()]
        self._loss = head.loss
        self._features, self._labels = train[0].detach(), train[1]
        self._damping = head.damping
        self._average = average
        self._grads: list[Tensor] = []

    def solve(self) -> None:
        """Newton's method with step halving: the problem is strongly convex for a linear head."""
        value, gradient = self._differentiate()
        first = _norm(gradient)
        for _ in range(NEWTON_STEPS):
            if float(_norm(gradient)) <= CG_TOLERANCE * float(first):
                return
            step = self.divide(gradient)
            before, size = self.weights, 1.0
            for _ in range(10):
                self.weights = _leaves(_add(before, step, -size))
                new_value, gradient = self._differentiate()
                if float(new_value) <= float(value):
                    break
                size /= 2
            else:
                # Rounding: no step lowers the loss any more.
                self.weights = before
                self._differentiate()
                return
            value = new_value

    def divide(self, vector: list[Tensor]) -> list[Tensor]:
        """``(H + damping)^-1 vector`` by conjugate gradients, H at the present weights."""
        x = [torch.zeros_like(v) for v in vector]
        residual = [v.clone() for v in vector]
        search = [v.clone() for v in vector]
        square = _dot(residual, residual)
        enough = float(square) * CG_TOLERANCE**2
        for _ in range(CG_STEPS):
            if float(square) <= enough:
                break
            product = self._multiply(search)
            rate = square / _dot(search, product)
            x = [a + rate * b for a, b in zip(x, search, strict=True)]
            residual = [a - rate * b for a, b in zip(residual, product, strict=True)]
            square, before = _dot(residual, residual), square
            search = [a + square / before * b for a, b in zip(residual, search, strict=True)]
        return x

    def _differentiate(self) -> tuple[Tensor, list[Tensor]]:
        """Value and gradient over all ranks; keeps the graph for Hessian products."""
        loss = self._loss(self.weights, self._features, self._labels)
        self._grads = list(torch.autograd.grad(loss, list(self.weights.values()), create_graph=True))
        away = [u.detach() - w for u, w in zip(self.weights.values(), self._start, strict=True)]
        (value,) = self._average([loss.detach().clone()])
        gradient = self._average([grad.detach().clone() for grad in self._grads])
        gradient = [g + self._damping * a for g, a in zip(gradient, away, strict=True)]
        return value + self._damping / 2 * _dot(away, away), gradient

    def _multiply(self, vector: list[Tensor]) -> list[Tensor]:
        leaves = list(self.weights.values())
        products = torch.autograd.grad(_dot(self._grads, vector), leaves, retain_graph=True)
        mean = self._average([product.detach().clone() for product in products])
        return [p + self._damping * v for p, v in zip(mean, vector, strict=True)]


def _heldout(
    head: HeadProblem, weights: Weights, heldout: Batch, average: Reduce
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """L_val at these weights, its cotangent on the features, its gradient over all ranks in the weights."""
    loss = head.loss(weights, *heldout)
    cotangent, *grads = torch.autograd.grad(loss, [heldout[0], *weights.values()])
    return loss.detach(), cotangent, average(grads)


def _leaves(weights: Weights) -> Weights:
    return {name: weight.detach().requires_grad_() for name, weight in weights.items()}


def _add(weights: Weights, vector: list[Tensor], scale: float) -> Weights:
    return {
        name: weight.detach() + scale * v for (name, weight), v in zip(weights.items(), vector, strict=True)
    }


def _dot(first: list[Tensor] | tuple[Tensor, ...], second: list[Tensor]) -> Tensor:
    return torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()


def _norm(vector: list[Tensor]) -> Tensor:
    return _dot(vector, vector).sqrt()
