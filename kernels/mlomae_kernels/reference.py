"""Every operator in plain PyTorch: what the fast implementations are held equal to.

All of them accept any floating dtype, any device and any patch grid, are differentiable any number of
times, work under ``torch.func`` and never read a tensor's values on the host, so that they do not stop
a GPU. Letters in shapes: see ``checks``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mlomae_kernels import checks

# Keeps the division finite on a patch of one colour (the constant of the MAE objective).
_NORM_PIX_EPS = 1e-6


def select_patches(scores: Tensor, num_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_select_patches(scores, num_keep)
    order = scores.detach().contiguous().argsort(dim=1, stable=True)
    ranks = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    ids_restore = torch.zeros_like(order).scatter(1, order, ranks)
    return order[:, :num_keep].contiguous(), ids_restore, (ids_restore >= num_keep).to(torch.float32)


def patch_gather(
    tokens: Tensor, pos_embed: Tensor | None, ids_keep: Tensor, cls_token: Tensor | None
) -> Tensor:
    checks.check_patch_gather(tokens, pos_embed, ids_keep, cls_token)
    batch, _, width = tokens.shape
    if pos_embed is not None:
        tokens = tokens + pos_embed
    visible = tokens.gather(1, ids_keep.unsqueeze(-1).expand(-1, -1, width))
    if cls_token is None:
        return visible
    return torch.cat([cls_token.expand(batch, -1, -1), visible], dim=1)


def patch_gather_backward(
    grad: Tensor, ids_keep: Tensor, num_patches: int, has_cls: bool, need_pos: bool
) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_patch_gather_backward(grad, ids_keep, num_patches, has_cls, need_pos)
    batch, _, width = grad.shape
    index = ids_keep.unsqueeze(-1).expand(-1, -1, width)
    kept = grad[:, int(has_cls) :]
    d_tokens = grad.new_zeros(batch, num_patches, width).scatter_add(1, index, kept)
    d_pos = _sum_over_batch(d_tokens) if need_pos else grad.new_empty(0)
    return d_tokens, d_pos, _sum_over_batch(grad[:, :1]) if has_cls else grad.new_empty(0)


def patch_scatter(
    latent: Tensor, mask_token: Tensor, ids_restore: Tensor, decoder_pos_embed: Tensor
) -> Tensor:
    checks.check_patch_scatter(latent, mask_token, ids_restore, decoder_pos_embed)
    batch, tokens, width = latent.shape
    filler = mask_token.expand(batch, 1 + ids_restore.shape[1] - tokens, -1)
    by_rank = torch.cat([latent[:, 1:], filler], dim=1)
    in_place = by_rank.gather(1, ids_restore.unsqueeze(-1).expand(-1, -1, width))
    return torch.cat([latent[:, :1], in_place], dim=1) + decoder_pos_embed


def patch_scatter_backward(
    grad: Tensor, ids_restore: Tensor, num_keep: int, need_pos: bool
) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_patch_scatter_backward(grad, ids_restore, num_keep, need_pos)
    ids_shuffle = ids_restore.argsort(dim=1).unsqueeze(-1).expand(-1, -1, grad.shape[2])
    by_rank = grad[:, 1:].gather(1, ids_shuffle)
    d_latent = torch.cat([grad[:, :1], by_rank[:, :num_keep]], dim=1)
    d_mask_token = _sum_over_batch(by_rank[:, num_keep:].sum(dim=1, keepdim=True, dtype=_wide(grad)))
    d_pos = _sum_over_batch(grad) if need_pos else grad.new_empty(0)
    return d_latent, d_mask_token.to(grad.dtype), d_pos


def masked_patch_loss(
    pred: Tensor, images: Tensor, removed: Tensor, weights: Tensor | None, patch_size: int, norm_pix: bool
) -> Tensor:
    checks.check_masked_patch_loss(pred, images, removed, weights, patch_size, norm_pix)
    errors = _differences(pred, images, removed, patch_size, norm_pix).square().mean(dim=2)
    return errors if weights is None else (weights * errors).masked_fill(_kept(removed), 0)


def masked_patch_loss_backward(
    grad: Tensor,
    pred: Tensor,
    images: Tensor,
    removed: Tensor,
    weights: Tensor | None,
    patch_size: int,
    norm_pix: bool,
) -> tuple[Tensor, Tensor]:
    checks.check_masked_patch_loss_backward(grad, pred, images, removed, weights, patch_size, norm_pix)
    differences = _differences(pred, images, removed, patch_size, norm_pix)
    # A weight or cotangent that is not finite must not reach a kept patch: 0 * inf is not 0.
    grad = grad.masked_fill(_kept(removed), 0)
    scale = grad if weights is None else (grad * weights).masked_fill(_kept(removed), 0)
    d_pred = ((scale * (2 / pred.shape[2])).unsqueeze(-1) * differences).to(pred.dtype)
    if weights is None:
        return d_pred, grad.new_empty(0)
    return d_pred, grad * differences.square().mean(dim=2)


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Cuts images into patches: row-major over the grid; within a patch (row, column, channel).

    Args:
        images: [B, C, H, W].
        patch_size: side in pixels; divides H and W.

    Returns:
        [B, L, P], the channel varying fastest.

    Raises:
        ValueError: on a wrong shape.
    """
    patches = checks.num_patches("patchify", images, patch_size)
    batch, channels, height, width = images.shape
    rows, columns = height // patch_size, width // patch_size
    cells = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, patches, patch_size**2 * channels)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """The inverse of ``patchify``.

    Args:
        patches: [B, L, P].
        grid: (rows, columns) of patches, rows * columns = L.
        patch_size: side in pixels.

    Returns:
        [B, C, H, W].

    Raises:
        ValueError: on a wrong shape.
    """
    name = "unpatchify"
    if patch_size < 1:
        raise checks.error(name, "patch_size", patch_size, "1 or more")
    checks.check_rank(name, "patches", patches, 3)
    batch, count, numbers = patches.shape
    rows, columns = grid
    if rows * columns != count:
        raise checks.error(name, "grid", f"{rows} x {columns}", f"a grid of {count} patches")
    if numbers % patch_size**2:
        raise checks.error(name, "patches", f"{numbers} numbers per patch", f"a multiple of {patch_size**2}")
    channels = numbers // patch_size**2
    cells = patches.reshape(batch, rows, columns, patch_size, patch_size, channels)
    pixels = cells.permute(0, 5, 1, 3, 2, 4)
    return pixels.reshape(batch, channels, rows * patch_size, columns * patch_size)


def _differences(pred: Tensor, images: Tensor, removed: Tensor, patch_size: int, norm_pix: bool) -> Tensor:
    """Prediction minus target [B, N, P] in the loss's precision; exactly 0 at kept patches."""
    target = patchify(images, patch_size).to(checks.loss_dtype(pred))
    if removed.dtype == torch.int64:
        target = target.gather(1, removed.unsqueeze(-1).expand(-1, -1, target.shape[2]))
    if norm_pix:
        centred = target - target.mean(dim=2, keepdim=True)
        variance = centred.square().sum(dim=2, keepdim=True) / (target.shape[2] - 1)
        target = centred / (variance + _NORM_PIX_EPS).sqrt()
    # A choice, not a product: 0 * inf would let a kept patch spoil the sum, or the gradient.
    return (pred.to(target.dtype) - target).masked_fill(_kept(removed).unsqueeze(-1), 0)


def _kept(removed: Tensor) -> Tensor:
    """[B, N], true where the patch does not count; ids name removed patches only."""
    if removed.dtype == torch.int64:
        return torch.zeros_like(removed, dtype=torch.bool)
    return removed == 0


def _sum_over_batch(values: Tensor) -> Tensor:
    return values.sum(dim=0, keepdim=True, dtype=_wide(values)).to(values.dtype)


def _wide(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
