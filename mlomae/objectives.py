"""The losses of the levels as plain functions.

Letters: B batch, L patches. ``mask`` is 1 at removed patches; M = sum(mask).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mlomae.data.dataset import VOID


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
    """Levels 2 and 3: cross-entropy, a mean over images, at least in float32.

    With label maps the loss of an image is the mean over its pixels that count, and 0 if none does. So every
    image weighs the same, as with class labels, and the mean over ranks is the loss of the global batch.

    Args:
        logits: [B, classes], or [B, classes, H, W].
        labels: int64 [B], or label maps uint8 [B, H, W], whose VOID pixels do not count.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    errors = F.cross_entropy(logits, labels.long(), ignore_index=VOID, reduction="none")
    return (errors * _pixel_shares(labels, errors.dtype)).sum()


def head_accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of right answers, averaged as in ``head_loss``; of pixels, where labels are maps."""
    right = (logits.detach().argmax(1) == labels).float()
    return right.mean() if labels.ndim == 1 else (right * _pixel_shares(labels, right.dtype)).sum()


def _pixel_shares(labels: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, H, W]: what each pixel of B label maps weighs in a mean over images."""
    counts = (labels != VOID).to(dtype)
    return counts / counts.sum(dim=(1, 2), keepdim=True).clamp(min=1) / len(labels)


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


def hardness_loss(scores: Tensor, mask: Tensor, errors: Tensor) -> Tensor:
    """How well scores rank the removed patches of an image by their errors: a pairwise logistic loss.

    The mean, over all pairs i ≠ j of removed patches of one image, of ``softplus(d) - y * d`` with
    ``d = scores_i - scores_j`` and y = 1 where ``errors_i > errors_j``, 0 where it is less, 1/2 where both
    are equal: the cross-entropy of sigmoid(d) for "i is harder than j" (HPM's relative loss: Wang et al.,
    "Hard Patches Mining for Masked Image Modeling", CVPR 2023). Equal scores give log 2. An image with less
    than two removed patches adds nothing.

    Args:
        scores: [B, L] differentiable in the masking network's weights.
        mask: [B, L].
        errors: [B, L] per-patch reconstruction errors, constant.
    """
    size = scores.shape[1]
    pairs = mask[:, :, None] * mask[:, None, :] * ~torch.eye(size, dtype=torch.bool, device=mask.device)
    harder = 0.5 + 0.5 * (errors[:, :, None] - errors[:, None, :]).sign()
    difference = scores[:, :, None] - scores[:, None, :]
    losses = F.binary_cross_entropy_with_logits(difference, harder.detach(), pairs, reduction="sum")
    return losses / pairs.sum().clamp(min=1)
