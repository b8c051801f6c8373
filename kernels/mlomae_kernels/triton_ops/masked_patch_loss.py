"""Weighted mean squared error of the removed patches, and its gradients:

    error[b, n]     = 1/P * sum over q of (pred[b, n, q] - target[b, n, q])^2,  result = weights * error
    target[b, n, q] = pixel, or with norm_pix (pixel - mean) / sqrt(variance + 1e-6), variance over P - 1
    d_pred          = grad * weights * 2/P * (pred - target),  d_weights = grad * error
    all of them exactly 0 at kept patches, of which neither prediction nor pixels are read

Letters: B batch, L patches, N predicted patches, C channels, P = patch_size^2 * C numbers of one patch,
q = (row, column, channel) in a patch, the channel fastest. Pixels are read from the image in the order of
the prediction; a patch stays in registers for the two passes of its variance and for its error. Computed
in float32, or float64 with a float64 prediction. A removed position out of range gives NaN.
"""

# Kernels are typed by Triton when they are compiled.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlomae_kernels.triton_ops import launch

# A program takes several patches, so that what does not depend on the patch is computed once for them.
# Small patches, whose sums cost most, go to one warp.
_LARGE_PATCH = 512
_NUMBERS_LARGE, _NUMBERS_SMALL = 4096, 1024


@triton.jit
def _numbers_of_patch(PATCH_SIZE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_NUMBERS: tl.constexpr):
    """(row, column, channel, q) of the numbers of a patch, [1, q] each.

    Putting q together again hides from the compiler that the prediction is contiguous. It would give each
    thread a vector of it, and the pixels, which are not, would be read from many cache lines at a time.
    Neighbouring threads with neighbouring q use whole cache lines of both.
    """
    q = tl.arange(0, BLOCK_NUMBERS)[None, :]
    row = q // (PATCH_SIZE * CHANNELS)
    column = q // CHANNELS % PATCH_SIZE
    channel = q % CHANNELS
    return row, column, channel, (row * PATCH_SIZE + column) * CHANNELS + channel


@triton.jit
def _differences(
    pred_ptr, images_ptr, removed_ptr, b, n,
    stride_pred_b, stride_pred_n, stride_pred_p,
    stride_images_b, stride_images_c, stride_images_h, stride_images_w,
    stride_removed_b, stride_removed_n,
    num_predicted, num_patches, columns,
    BY_ID: tl.constexpr, NORM_PIX: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    PATCH_SIZE: tl.constexpr, CHANNELS: tl.constexpr, BLOCK_NUMBERS: tl.constexpr,
):  # fmt: skip
    """Prediction minus target of patches n of image b, [n, q]; whether they count; whether they exist."""
    NUMBERS: tl.constexpr = PATCH_SIZE * PATCH_SIZE * CHANNELS
    counts = n < num_predicted
    removed = tl.load(removed_ptr + b * stride_removed_b + n * stride_removed_n, mask=counts, other=0)
    if BY_ID:
        exists = (removed >= 0) & (removed < num_patches)
        position = tl.where(exists, removed, 0).to(tl.int32)
    else:
        counts = counts & (removed != 0)
        exists = counts
        position = n.to(tl.int32)
    row, column, channel, q = _numbers_of_patch(PATCH_SIZE, CHANNELS, BLOCK_NUMBERS)
    inside = q < NUMBERS
    mask = (counts & exists)[:, None] & inside
    images_ptr += b * stride_images_b
    images_ptr += (position // columns * PATCH_SIZE).to(tl.int64) * stride_images_h
    images_ptr += (position % columns * PATCH_SIZE).to(tl.int64) * stride_images_w
    offset = row.to(OFFSET) * stride_images_h
    offset += column.to(OFFSET) * stride_images_w + channel.to(OFFSET) * stride_images_c
    target = tl.load(images_ptr[:, None] + offset, mask=mask, other=0.0).to(ACCUMULATOR)
    pred_ptr += b * stride_pred_b + n * stride_pred_n
    pred = tl.load(pred_ptr[:, None] + q.to(OFFSET) * stride_pred_p, mask=mask, other=0.0).to(ACCUMULATOR)
    if NORM_PIX:
        mean = tl.sum(target, axis=1) / NUMBERS
        target = tl.where(inside, target - mean[:, None], 0.0)
        variance = tl.sum(target * target, axis=1) / (NUMBERS - 1)
        target *= (1.0 / tl.sqrt(variance + 1e-6))[:, None]
    return pred - target, counts, exists


@triton.jit
def _masked_patch_loss_kernel(
    loss_ptr,  # [B, N], contiguous
    pred_ptr,  # [B, N, P]
    images_ptr,  # [B, C, H, W]
    removed_ptr,  # [B, N] positions or [B, L] mask
    weights_ptr,  # [B, N] or None
    stride_pred_b, stride_pred_n, stride_pred_p,
    stride_images_b, stride_images_c, stride_images_h, stride_images_w,
    stride_removed_b, stride_removed_n,
    stride_weights_b, stride_weights_n,
    num_predicted, num_patches, columns,
    BY_ID: tl.constexpr, NORM_PIX: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    PATCH_SIZE: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr, BLOCK_NUMBERS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1).to(tl.int64) * BLOCK_PATCHES + tl.arange(0, BLOCK_PATCHES)
    difference, counts, exists = _differences(
        pred_ptr, images_ptr, removed_ptr, b, n,
        stride_pred_b, stride_pred_n, stride_pred_p,
        stride_images_b, stride_images_c, stride_images_h, stride_images_w,
        stride_removed_b, stride_removed_n, num_predicted, num_patches, columns,
        BY_ID, NORM_PIX, ACCUMULATOR, OFFSET, PATCH_SIZE, CHANNELS, BLOCK_NUMBERS,
    )  # fmt: skip
    loss = tl.sum(difference * difference, axis=1) / (PATCH_SIZE * PATCH_SIZE * CHANNELS)
    if weights_ptr is not None:
        weights_ptr += b * stride_weights_b + n * stride_weights_n
        loss *= tl.load(weights_ptr, mask=counts, other=0.0).to(ACCUMULATOR)
    loss = tl.where(counts, tl.where(exists, loss, float("nan")), 0.0)
    tl.store(loss_ptr + b * num_predicted + n, loss, mask=n < num_predicted)


@triton.jit
def _masked_patch_loss_backward_kernel(
    d_pred_ptr,  # [B, N, P], contiguous
    d_weights_ptr,  # [B, N], contiguous, or None
    grad_ptr,  # [B, N]
    stride_grad_b, stride_grad_n,
    pred_ptr,  # [B, N, P]
    images_ptr,  # [B, C, H, W]
    removed_ptr,  # [B, N] positions or [B, L] mask
    weights_ptr,  # [B, N] or None
    stride_pred_b, stride_pred_n, stride_pred_p,
    stride_images_b, stride_images_c, stride_images_h, stride_images_w,
    stride_removed_b, stride_removed_n,
    stride_weights_b, stride_weights_n,
    num_predicted, num_patches, columns,
    BY_ID: tl.constexpr, NORM_PIX: tl.constexpr, ACCUMULATOR: tl.constexpr, OFFSET: tl.constexpr,
    PATCH_SIZE: tl.constexpr, CHANNELS: tl.constexpr,
    BLOCK_PATCHES: tl.constexpr, BLOCK_NUMBERS: tl.constexpr,
):  # fmt: skip
    NUMBERS: tl.constexpr = PATCH_SIZE * PATCH_SIZE * CHANNELS
    b = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1).to(tl.int64) * BLOCK_PATCHES + tl.arange(0, BLOCK_PATCHES)
    difference, counts, exists = _differences(
        pred_ptr, images_ptr, removed_ptr, b, n,
        stride_pred_b, stride_pred_n, stride_pred_p,
        stride_images_b, stride_images_c, stride_images_h, stride_images_w,
        stride_removed_b, stride_removed_n, num_predicted, num_patches, columns,
        BY_ID, NORM_PIX, ACCUMULATOR, OFFSET, PATCH_SIZE, CHANNELS, BLOCK_NUMBERS,
    )  # fmt: skip
    grad = tl.load(grad_ptr + b * stride_grad_b + n * stride_grad_n, mask=counts, other=0.0)
    scale = tl.where(exists, grad.to(ACCUMULATOR), float("nan"))
    if weights_ptr is not None:
        error = tl.sum(difference * difference, axis=1) / NUMBERS
        d_weights = tl.where(counts, scale * error, 0.0)
        tl.store(d_weights_ptr + b * num_predicted + n, d_weights, mask=n < num_predicted)
        weights_ptr += b * stride_weights_b + n * stride_weights_n
        scale *= tl.load(weights_ptr, mask=counts, other=0.0).to(ACCUMULATOR)
    # A choice, not a product: 0 * inf must not reach a kept patch.
    d_pred = tl.where(counts[:, None], (scale * (2 / NUMBERS))[:, None] * difference, 0.0)
    q = _numbers_of_patch(PATCH_SIZE, CHANNELS, BLOCK_NUMBERS)[3]
    d_pred_ptr += (b * num_predicted + n) * NUMBERS
    tl.store(d_pred_ptr[:, None] + q, d_pred, mask=(n < num_predicted)[:, None] & (q < NUMBERS))


def masked_patch_loss(
    pred: Tensor, images: Tensor, removed: Tensor, weights: Tensor | None, patch_size: int, norm_pix: bool
) -> Tensor:
    """pred [B, N, P], images [B, C, H, W], removed [B, N] or mask [B, L], weights [B, N] → [B, N]."""
    loss = pred.new_empty(pred.shape[:2], dtype=launch.accumulator_dtype(pred.dtype))
    if loss.numel():
        grid, arguments, constants = _arguments(pred, images, removed, weights, patch_size, norm_pix)
        launch.run(_masked_patch_loss_kernel, grid, loss, *arguments, **constants)
    return loss


def masked_patch_loss_backward(
    grad: Tensor,
    pred: Tensor,
    images: Tensor,
    removed: Tensor,
    weights: Tensor | None,
    patch_size: int,
    norm_pix: bool,
) -> tuple[Tensor, Tensor]:
    """grad [B, N] and the arguments of the loss → d_pred [B, N, P], d_weights [B, N] or [0]."""
    d_pred = pred.new_empty(pred.shape)
    d_weights = None if weights is None else weights.new_empty(weights.shape)
    if d_pred.numel():
        grid, arguments, constants = _arguments(pred, images, removed, weights, patch_size, norm_pix)
        arguments = d_weights, grad, *grad.stride(), *arguments
        launch.run(_masked_patch_loss_backward_kernel, grid, d_pred, *arguments, **constants)
    return d_pred, grad.new_empty(0) if d_weights is None else d_weights


def _arguments(
    pred: Tensor, images: Tensor, removed: Tensor, weights: Tensor | None, patch_size: int, norm_pix: bool
) -> tuple[tuple[int, int], tuple[Any, ...], dict[str, Any]]:
    """The grid, and what the two kernels have in common from ``pred_ptr`` on."""
    batch, predicted, numbers = pred.shape
    channels, height, width = images.shape[1:]
    columns = width // patch_size
    block_numbers = launch.power_of_two(numbers)
    large = block_numbers >= _LARGE_PATCH
    most = (_NUMBERS_LARGE if large else _NUMBERS_SMALL) // block_numbers
    block_patches = min(launch.power_of_two(predicted), max(most, 1))
    # Several large patches share a warp with half of the registers that a single one takes.
    tile = block_patches * block_numbers // (2 if large and block_patches > 1 else 1)
    reach = (patch_size - 1) * (images.stride(2) + images.stride(3)) + (channels - 1) * images.stride(1)
    arguments = (
        *(pred, images, removed, weights),
        *(*pred.stride(), *images.stride(), *removed.stride()),
        *((0, 0) if weights is None else weights.stride()),
        *(predicted, height // patch_size * columns, columns),
    )
    constants = {
        "BY_ID": removed.dtype == torch.int64,
        "NORM_PIX": norm_pix,
        "ACCUMULATOR": launch.accumulator(pred.dtype),
        "OFFSET": tl.int32 if max(reach, numbers * pred.stride(2)) < 2**31 else tl.int64,
        "PATCH_SIZE": patch_size,
        "CHANNELS": channels,
        "BLOCK_PATCHES": block_patches,
        "BLOCK_NUMBERS": block_numbers,
        "num_warps": launch.num_warps(tile, pred.dtype),
    }
    return (batch, launch.ceil_div(predicted, block_patches)), arguments, constants
