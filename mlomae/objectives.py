"""The losses of the three levels as plain functions.

Letters: B batch, L patches. ``mask`` is 1 at removed patches; M = sum(mask).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def pretrain_loss(errors: Tensor, mask: Tensor, weights: Tensor | None) -> Tensor:
    """Level 1: sum(mask * weights * errors) / sum(mask) (Guo et al. 2025, stage I).

    Args:
        errors: [B, L] per-patch reconstruction errors.
        mask: [B, L].
        weights: [B, L] mask probabilities, constant for this level; None weighs all patches alike.
    """
    weighted = errors * mask if weights is None else errors * mask * weights
    return weighted.sum() / mask.sum()


def head_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Levels 2 and 3: cross-entropy of [B, classes] logits and int64 [B] labels, at least in float32."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels)


def mask_loss(probability: Tensor, mask: Tensor, influence: Tensor, pretrain_lr: float) -> Tensor:
    """Level 3's surrogate, whose gradient in the masking network's weights is the hypergradient.

    The masking network enters the pretrain loss through the weights only, so
    ``d L_val / d phi = -lr * sum(mask / M * influence * d probability / d phi)``: the gradient of a
    function that is linear in the probabilities.

    Args:
        probability: [B, L] differentiable in the masking network's weights.
        mask: [B, L] of the pretrain step that is differentiated.
        influence: [B, L] derivative of each patch's error along the direction v, constant.
        pretrain_lr: step size of the pretrain level.
    """
    return -pretrain_lr * (mask * influence * probability).sum() / mask.sum()
