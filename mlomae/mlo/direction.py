"""The direction v in encoder-weight space: how the held-out loss changes with the encoder.

With features F = E(x; theta) of the train batch (F_t) and the held-out batch (F_h), and one
look-ahead step of the head, w' = w - lr * grad_w L_tr(F_t, w), the held-out loss is a function of the
features alone: L_val(F_h, w'). Its exact cotangents

    c_h = d L_val / d F_h
    c_t = -lr * d/dF_t [ grad_w L_tr(F_t, w) . grad_w' L_val(F_h, w') ]

cost nothing next to the encoder, and one backward pass of the encoder with (c_t, c_h) gives v. With
``levels=2`` the look-ahead is left out: w' = w and c_t = 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Loss = Callable[[Weights, Tensor, Tensor], Tensor]
"""Loss of (head weights, features [B, D], labels [B]): a mean over the batch."""
Reduce = Callable[[list[Tensor]], list[Tensor]]
"""Averages a list of tensors over all ranks."""


@dataclass(frozen=True)
class HeadProblem:
    """Level 2 as seen from level 3.

    Attributes:
        loss: the head's loss as a function of its weights.
        weights: the head's present weights, by name.
        lr: step size of the look-ahead step.
        levels: 3 differentiates through the look-ahead step, 2 does not take it.
    """

    loss: Loss
    weights: Weights
    lr: float
    levels: int


@dataclass(frozen=True)
class Cotangents:
    """``train`` and ``heldout``: [B, D] cotangents on the features; ``loss``: L_val(F_h, w'), 0-dim."""

    train: Tensor | None
    heldout: Tensor
    loss: Tensor


def feature_cotangents(
    head: HeadProblem,
    train: tuple[Tensor, Tensor],
    heldout: tuple[Tensor, Tensor],
    average: Reduce,
) -> Cotangents:
    """Exact cotangents of the held-out loss on the features of both batches.

    Args:
        head: the head's loss and weights.
        train: features [B, D] and labels [B] of the train batch on this rank.
        heldout: the same of the held-out batch.
        average: mean over ranks. The head's gradients are averaged before use, so that w' is the
            same on every rank; the cotangents belong to this rank's images.
    """
    heldout_features = heldout[0].detach().requires_grad_()
    weights = {name: weight.detach().requires_grad_() for name, weight in head.weights.items()}
    if head.levels == 2:
        loss = head.loss(weights, heldout_features, heldout[1])
        (cotangent,) = torch.autograd.grad(loss, heldout_features)
        return Cotangents(None, cotangent, loss.detach())

    train_features = train[0].detach().requires_grad_()
    train_loss = head.loss(weights, train_features, train[1])
    train_grads = torch.autograd.grad(train_loss, list(weights.values()), create_graph=True)
    mean_grads = average([grad.detach() for grad in train_grads])
    ahead = {
        name: (weight.detach() - head.lr * grad).requires_grad_()
        for (name, weight), grad in zip(weights.items(), mean_grads, strict=True)
    }
    loss = head.loss(ahead, heldout_features, heldout[1])
    cotangent, *ahead_grads = torch.autograd.grad(loss, [heldout_features, *ahead.values()])
    ahead_grads = average(ahead_grads)
    product = torch.stack([(a * b).sum() for a, b in zip(train_grads, ahead_grads, strict=True)]).sum()
    (mixed,) = torch.autograd.grad(product, train_features)
    return Cotangents(-head.lr * mixed, cotangent, loss.detach())


@dataclass(frozen=True)
class Direction:
    """v and what its computation leaves behind for the head's own step.

    Attributes:
        values: v like the encoder's parameters, equal on every rank.
        train_features: [B, D] of the train batch on this rank, constant.
        heldout_loss: L_val(F_h, w') on this rank, 0-dim.
    """

    values: list[Tensor]
    train_features: Tensor
    heldout_loss: Tensor


def encoder_direction(
    encode: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    head: HeadProblem,
    train: tuple[Tensor, Tensor],
    heldout: tuple[Tensor, Tensor],
    average: Reduce,
) -> Direction:
    """v = d L_val / d theta through the features of both batches: one backward pass.

    Args:
        encode: images [B, C, H, W] → features [B, D], differentiable in ``parameters``, with
            rank-local gradients.
        parameters: the encoder's weights.
        head: level 2.
        train: images and labels of the train batch on this rank.
        heldout: the same of the held-out batch.
        average: mean over ranks.
    """
    if head.levels == 2:
        with torch.no_grad():
            train_features = encode(train[0])
        features = heldout_features = encode(heldout[0])
    else:
        features = encode(torch.cat([train[0], heldout[0]]))
        train_features, heldout_features = features.split([len(train[0]), len(heldout[0])])
    cotangents = feature_cotangents(head, (train_features, train[1]), (heldout_features, heldout[1]), average)
    parts = [part for part in (cotangents.train, cotangents.heldout) if part is not None]
    grads = torch.autograd.grad(features, list(parameters), torch.cat(parts).to(features.dtype))
    return Direction(average(list(grads)), train_features.detach(), cotangents.loss)
