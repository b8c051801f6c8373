"""Every operator in plain PyTorch: what the fast implementations are held equal to.

All of them accept any floating dtype, any device and any patch grid, are twice differentiable, work
under ``torch.func`` and never read a tensor's values on the host, so that they do not stop a GPU.
Indices are therefore not range-checked; torch's own indexing does that where it can.

Letters in shapes: B batch, L patches of an image, K kept patches, D width, C channels,
P = patch_size * patch_size * C numbers of one patch.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Keeps the division finite on a patch of one colour (the constant of the MAE objective).
_NORM_PIX_EPS = 1e-6


def select_patches(scores: Tensor, num_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the ``num_keep`` patches with the lowest scores; removes the others.

    The order is that of a stable ascending sort: equal scores rank by position, -0.0 equals 0.0 and
    NaN ranks last. No gradient flows through a selection.

    Args:
        scores: floating [B, L].
        num_keep: K, from 0 to L.

    Returns:
        ids_keep: int64 [B, K], positions of the kept patches, lowest score first.
        ids_restore: int64 [B, L], rank of every patch; a patch is kept when its rank is below K.
        mask: float32 [B, L], 0 for a kept patch and 1 for a removed one.

    Raises:
        ValueError: on a wrong shape, dtype or count.
    """
    check_selection(scores, num_keep)
    order = scores.detach().contiguous().argsort(dim=1, stable=True)
    ranks = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    ids_restore = torch.zeros_like(order).scatter(1, order, ranks)
    return order[:, :num_keep].contiguous(), ids_restore, (ids_restore >= num_keep).to(torch.float32)


def patch_gather(
    tokens: Tensor, pos_embed: Tensor | None, ids_keep: Tensor, cls_token: Tensor | None
) -> Tensor:
    """Adds positions, picks the kept tokens and prepends the class token: the encoder's input.

    Args:
        tokens: [B, L, D].
        pos_embed: [1, L, D] added to the tokens, or None.
        ids_keep: int64 [B, K].
        cls_token: [1, 1, D] prepended as it is (with its position already added), or None.

    Returns:
        [B, K, D], or [B, 1 + K, D] with a class token.

    Raises:
        ValueError: on a wrong shape or dtype.
    """
    name = "patch_gather"
    _check_rank(name, "tokens", tokens, 3)
    batch, patches, width = tokens.shape
    _check_ids(name, "ids_keep", ids_keep, (batch, None))
    if pos_embed is not None:
        _check_shape(name, "pos_embed", pos_embed, (1, patches, width))
        tokens = tokens + pos_embed
    visible = tokens.gather(1, ids_keep.unsqueeze(-1).expand(-1, -1, width))
    if cls_token is None:
        return visible
    _check_shape(name, "cls_token", cls_token, (1, 1, width))
    return torch.cat([cls_token.expand(batch, -1, -1), visible], dim=1)


def patch_scatter(
    latent: Tensor, mask_token: Tensor, ids_restore: Tensor, decoder_pos_embed: Tensor
) -> Tensor:
    """Puts kept tokens back in place, fills the gaps with the mask token, adds positions.

    Args:
        latent: [B, 1 + K, D], the class token first.
        mask_token: [1, 1, D].
        ids_restore: int64 [B, L], a permutation in each row.
        decoder_pos_embed: [1, 1 + L, D], the class token's position first.

    Returns:
        [B, 1 + L, D], the class token first: the decoder's input.

    Raises:
        ValueError: on a wrong shape or dtype.
    """
    name = "patch_scatter"
    _check_rank(name, "latent", latent, 3)
    batch, tokens, width = latent.shape
    _check_ids(name, "ids_restore", ids_restore, (batch, None))
    patches = ids_restore.shape[1]
    if not 1 <= tokens <= 1 + patches:
        raise _error(name, "latent", f"{tokens} tokens", f"1 to {1 + patches} (class token and kept patches)")
    _check_shape(name, "mask_token", mask_token, (1, 1, width))
    _check_shape(name, "decoder_pos_embed", decoder_pos_embed, (1, 1 + patches, width))
    filler = mask_token.expand(batch, 1 + patches - tokens, -1)
    by_rank = torch.cat([latent[:, 1:], filler], dim=1)
    in_place = by_rank.gather(1, ids_restore.unsqueeze(-1).expand(-1, -1, width))
    return torch.cat([latent[:, :1], in_place], dim=1) + decoder_pos_embed


def masked_patch_loss(pred: Tensor, images: Tensor, mask: Tensor, patch_size: int, norm_pix: bool) -> Tensor:
    """Mean squared error of every removed patch; exactly 0 at the kept ones.

    Computed in float32, or in float64 when an input is.

    Args:
        pred: [B, L, P], pixels of a patch in the order of ``patchify``.
        images: floating [B, C, H, W].
        mask: [B, L], 0 for a kept patch and 1 for a removed one; receives no gradient.
        patch_size: side of a patch in pixels.
        norm_pix: normalise each target patch to (x - mean) / sqrt(var + 1e-6), unbiased variance.

    Returns:
        float32 or float64 [B, L].

    Raises:
        ValueError: on a wrong shape or dtype.
    """
    name = "masked_patch_loss"
    _check_floating(name, "pred", pred)
    _check_floating(name, "images", images)
    target = _patchify(name, images, patch_size)
    _check_shape(name, "pred", pred, tuple(target.shape))
    _check_shape(name, "mask", mask, tuple(target.shape[:2]))
    dtype = torch.promote_types(torch.promote_types(pred.dtype, images.dtype), torch.float32)
    target = target.to(dtype)
    if norm_pix:
        if target.shape[2] < 2:
            raise _error(name, "patch_size", f"{patch_size} with norm_pix", "patches of 2 or more numbers")
        variance, mean = torch.var_mean(target, dim=2, keepdim=True)
        target = (target - mean) / (variance + _NORM_PIX_EPS).sqrt()
    difference = pred.to(dtype) - target
    # A choice, not a product: 0 * inf would let a kept patch spoil the sum, or the gradient.
    return difference.masked_fill((mask == 0).unsqueeze(-1), 0).square().mean(dim=2)


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
    return _patchify("patchify", images, patch_size)


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
    _check_patch_size(name, patch_size)
    _check_rank(name, "patches", patches, 3)
    batch, count, numbers = patches.shape
    rows, columns = grid
    if rows * columns != count:
        raise _error(name, "grid", f"{rows} x {columns}", f"a grid of {count} patches")
    if numbers % patch_size**2:
        raise _error(name, "patches", f"{numbers} numbers per patch", f"a multiple of {patch_size**2}")
    channels = numbers // patch_size**2
    cells = patches.reshape(batch, rows, columns, patch_size, patch_size, channels)
    pixels = cells.permute(0, 5, 1, 3, 2, 4)
    return pixels.reshape(batch, channels, rows * patch_size, columns * patch_size)


def check_selection(scores: Tensor, num_keep: int) -> None:
    """Raises the ValueError of ``select_patches`` for arguments that no implementation accepts."""
    name = "select_patches"
    _check_rank(name, "scores", scores, 2)
    _check_floating(name, "scores", scores)
    if not 0 <= num_keep <= scores.shape[1]:
        raise _error(name, "num_keep", num_keep, f"0 to {scores.shape[1]} (the patches of scores)")


def _patchify(operator: str, images: Tensor, patch_size: int) -> Tensor:
    _check_patch_size(operator, patch_size)
    _check_rank(operator, "images", images, 4)
    batch, channels, height, width = images.shape
    if height % patch_size or width % patch_size:
        raise _error(
            operator, "images", f"{height} x {width} pixels", f"multiples of {patch_size} (patch_size)"
        )
    rows, columns = height // patch_size, width // patch_size
    cells = images.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, patch_size**2 * channels)


def _error(operator: str, argument: str, got: object, expected: str) -> ValueError:
    return ValueError(f"{operator}: {argument}: got {got}, expected {expected}")


def _check_patch_size(operator: str, patch_size: int) -> None:
    if patch_size < 1:
        raise _error(operator, "patch_size", patch_size, "1 or more")


def _check_floating(operator: str, argument: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise _error(operator, argument, tensor.dtype, "a floating dtype")


def _check_rank(operator: str, argument: str, tensor: Tensor, rank: int) -> None:
    if tensor.dim() != rank:
        raise _error(operator, argument, f"shape {list(tensor.shape)}", f"{rank} dimensions")


def _check_shape(operator: str, argument: str, tensor: Tensor, shape: tuple[int | None, ...]) -> None:
    """``None`` in ``shape`` accepts any size."""
    _check_rank(operator, argument, tensor, len(shape))
    if any(want is not None and got != want for got, want in zip(tensor.shape, shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise _error(operator, argument, f"shape {list(tensor.shape)}", f"[{wanted}]")


def _check_ids(operator: str, argument: str, ids: Tensor, shape: tuple[int | None, ...]) -> None:
    if ids.dtype != torch.int64:
        raise _error(operator, argument, ids.dtype, "torch.int64")
    _check_shape(operator, argument, ids, shape)
