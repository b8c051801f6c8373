"""The reconstruction error of every removed patch, straight from the image.

    error[b, n]  = 1/P * sum_p (pred[b, n, p] - target[b, n, p])²       (He et al. 2022, sec. 3)
    result       = weights * error

    d result / d pred    = weights * 2/P * (pred - target)
    d result / d weights = error

The target of a patch is its pixels, or with ``norm_pix`` its pixels normalised by their mean and unbiased
variance. Second derivatives, and gradients in the images, are those of the plain PyTorch formula.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlomae_kernels import checks, reference
from mlomae_kernels._registry import Operator


def _fake(
    pred: Tensor, images: Tensor, removed: Tensor, weights: Tensor | None, patch_size: int, norm_pix: bool
) -> Tensor:
    return pred.new_empty(pred.shape[:2], dtype=checks.loss_dtype(pred))


def _fake_backward(
    grad: Tensor,
    pred: Tensor,
    images: Tensor,
    removed: Tensor,
    weights: Tensor | None,
    patch_size: int,
    norm_pix: bool,
) -> tuple[Tensor, Tensor]:
    d_weights = grad.new_empty(0 if weights is None else pred.shape[:2])
    return torch.empty_like(pred, memory_format=torch.contiguous_format), d_weights


LOSS = Operator(
    "masked_patch_loss(Tensor pred, Tensor images, Tensor removed, Tensor? weights, int patch_size,"
    " bool norm_pix) -> Tensor",
    reference=reference.masked_patch_loss,
    check=checks.check_masked_patch_loss,
    fake=_fake,
    check_values=checks.check_masked_patch_loss_values,
)
LOSS_BACKWARD = Operator(
    "masked_patch_loss_backward(Tensor grad, Tensor pred, Tensor images, Tensor removed, Tensor? weights,"
    " int patch_size, bool norm_pix) -> (Tensor pred, Tensor weights)",
    reference=reference.masked_patch_loss_backward,
    check=checks.check_masked_patch_loss_backward,
    fake=_fake_backward,
    check_values=checks.check_masked_patch_loss_backward_values,
)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pred: Tensor,
        images: Tensor,
        removed: Tensor,
        weights: Tensor | None,
        patch_size: int,
        norm_pix: bool,
    ) -> Tensor:
        ctx.save_for_backward(pred, images, removed, weights)
        ctx.patch_size, ctx.norm_pix = patch_size, norm_pix
        return LOSS.below_autograd(pred, images, removed, weights, patch_size, norm_pix)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        pred, images, removed, weights = ctx.saved_tensors
        d_pred, d_weights = LOSS_BACKWARD.overload(
            grad, pred, images, removed, weights, ctx.patch_size, ctx.norm_pix
        )
        return d_pred, None, None, None if weights is None else d_weights, None, None


LOSS.differentiate(_Loss, (0, 3))


def masked_patch_loss(
    pred: Tensor,
    images: Tensor,
    removed: Tensor,
    weights: Tensor | None = None,
    *,
    patch_size: int,
    norm_pix: bool,
) -> Tensor:
    """Mean squared error of every removed patch, times its weight; exactly 0 at the kept ones.

    Computed in float32, or float64 when ``pred`` is. Reads removed patches only and materialises no
    target. Differentiable in ``pred`` and ``weights`` (the gradient of a weight is the error of its
    patch); deterministic.

    Args:
        pred: floating [B, N, P], the predicted pixels of a patch in the order of ``patchify``.
        images: [B, C, H, W] in the dtype of ``pred``, or float32 with a narrower ``pred``.
        removed: which patches ``pred`` holds: either the float32 mask [B, L], 0 for a kept patch and
            anything else for a removed one, when all are predicted (N = L); or int64 [B, N], the positions
            of removed patches, when only those are. Receives no gradient.
        weights: float32 (float64 with a float64 ``pred``) [B, N], or None for 1.
        patch_size: side of a patch in pixels.
        norm_pix: normalise each target patch to (x - mean) / sqrt(var + 1e-6), unbiased variance.

    Returns:
        float32 or float64 [B, N].

    Raises:
        ValueError: on a wrong shape, dtype or device.
        RuntimeError: on a position out of range on the CPU; on a GPU its error is NaN.
    """
    errors: Tensor = LOSS.overload(pred, images, removed, weights, patch_size, norm_pix)
    return errors
