"""The direction v in weight space: how the held-out loss changes with the encoder.

The held-out loss depends on the encoder through the features of two batches. Train and held-out
images go through the encoder together; the cotangents on their features are exact
(``mlomae.mlo.best_response``), and one backward pass of the encoder with both gives v.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mlomae.mlo.best_response import Batch, HeadProblem, feature_cotangents
from mlomae.mlo.space import Reduce, WeightSpace


@dataclass(frozen=True)
class Direction:
    """v and what its computation leaves behind for the head's own step.

    Attributes:
        values: v, this rank's part of a vector of the weight space.
        train_features: [B, D] of the train batch on this rank, constant.
        heldout_loss: L_val(F_h, w') on this rank, 0-dim.
    """

    values: list[Tensor]
    train_features: Tensor
    heldout_loss: Tensor


def encoder_direction(
    encode: Callable[[Tensor], Tensor],
    space: WeightSpace,
    head: HeadProblem,
    train: Batch,
    heldout: Batch,
    average: Reduce,
) -> Direction:
    """v = d L_val / d theta through the features of both batches: one backward pass.

    Args:
        encode: images [B, C, H, W] → features [B, D], differentiable in the weights of ``space``.
        space: the encoder's weights.
        head: level 2. If it does not answer, no gradient flows through the train batch.
        train: images and labels of the train batch on this rank.
        heldout: the same of the held-out batch.
        average: mean over ranks.
    """
    if head.response == "frozen":
        with torch.no_grad():
            train_features = encode(train[0])
        features = heldout_features = encode(heldout[0])
    else:
        features = encode(torch.cat([train[0], heldout[0]]))
        train_features, heldout_features = features.split([len(train[0]), len(heldout[0])])
    cotangents = feature_cotangents(head, (train_features, train[1]), (heldout_features, heldout[1]), average)
    parts = [part for part in (cotangents.train, cotangents.heldout) if part is not None]
    values = space.gradient(features, torch.cat(parts).to(features.dtype))
    return Direction(values, train_features.detach(), cotangents.loss)
