"""What each operator accepts: every check that needs no value of a tensor, and those that do.

An error is one line: operator, argument, what was found, what would be right. ``check_*`` read shapes,
dtypes and devices only; ``check_*_values`` read indices and, on a GPU, wait for it.

Letters in shapes: B batch, L patches, K kept patches, N predicted patches, D width, C channels,
P = patch_size * patch_size * C numbers of one patch.
"""

from __future__ import annotations

import torch
from torch import Tensor

Shape = tuple[int | None, ...]


def error(operator: str, argument: str, got: object, expected: str) -> ValueError:
    return ValueError(f"{operator}: {argument}: got {got}, expected {expected}")


def check_select_patches(scores: Tensor, num_keep: int) -> None:
    name = "select_patches"
    check_rank(name, "scores", scores, 2)
    _check_floating(name, "scores", scores)
    if not 1 <= num_keep <= scores.shape[1]:
        raise error(name, "num_keep", num_keep, f"1 to {scores.shape[1]} (the patches of scores)")


def check_patch_gather(
    tokens: Tensor, pos_embed: Tensor | None, ids_keep: Tensor, cls_token: Tensor | None
) -> None:
    name = "patch_gather"
    check_rank(name, "tokens", tokens, 3)
    _check_floating(name, "tokens", tokens)
    batch, patches, width = tokens.shape
    _check_ids(name, "ids_keep", ids_keep, (batch, None), tokens)
    if pos_embed is not None:
        _check_like(name, "pos_embed", pos_embed, (1, patches, width), tokens)
    if cls_token is not None:
        _check_like(name, "cls_token", cls_token, (1, 1, width), tokens)


def check_patch_gather_values(
    tokens: Tensor, pos_embed: Tensor | None, ids_keep: Tensor, cls_token: Tensor | None
) -> None:
    _check_range("patch_gather", "ids_keep", ids_keep, tokens.shape[1])


def check_patch_gather_backward(
    grad: Tensor, ids_keep: Tensor, num_patches: int, has_cls: bool, need_pos: bool
) -> None:
    name = "patch_gather_backward"
    check_rank(name, "grad", grad, 3)
    _check_floating(name, "grad", grad)
    _check_ids(name, "ids_keep", ids_keep, (grad.shape[0], grad.shape[1] - int(has_cls)), grad)


def check_patch_gather_backward_values(
    grad: Tensor, ids_keep: Tensor, num_patches: int, has_cls: bool, need_pos: bool
) -> None:
    _check_range("patch_gather_backward", "ids_keep", ids_keep, num_patches)


def check_patch_scatter(
    latent: Tensor, mask_token: Tensor, ids_restore: Tensor, decoder_pos_embed: Tensor
) -> None:
    name = "patch_scatter"
    check_rank(name, "latent", latent, 3)
    _check_floating(name, "latent", latent)
    batch, tokens, width = latent.shape
    _check_ids(name, "ids_restore", ids_restore, (batch, None), latent)
    patches = ids_restore.shape[1]
    if not 1 <= tokens <= 1 + patches:
        raise error(name, "latent", f"{tokens} tokens", f"1 to {1 + patches} (class token and kept patches)")
    _check_like(name, "mask_token", mask_token, (1, 1, width), latent)
    _check_like(name, "decoder_pos_embed", decoder_pos_embed, (1, 1 + patches, width), latent)


def check_patch_scatter_values(
    latent: Tensor, mask_token: Tensor, ids_restore: Tensor, decoder_pos_embed: Tensor
) -> None:
    _check_permutation("patch_scatter", "ids_restore", ids_restore)


def check_patch_scatter_backward(grad: Tensor, ids_restore: Tensor, num_keep: int, need_pos: bool) -> None:
    name = "patch_scatter_backward"
    check_rank(name, "grad", grad, 3)
    _check_floating(name, "grad", grad)
    _check_ids(name, "ids_restore", ids_restore, (grad.shape[0], grad.shape[1] - 1), grad)
    if not 0 <= num_keep <= ids_restore.shape[1]:
        raise error(name, "num_keep", num_keep, f"0 to {ids_restore.shape[1]} (the patches of ids_restore)")


def check_patch_scatter_backward_values(
    grad: Tensor, ids_restore: Tensor, num_keep: int, need_pos: bool
) -> None:
    _check_permutation("patch_scatter_backward", "ids_restore", ids_restore)


def check_masked_patch_loss(
    pred: Tensor, images: Tensor, removed: Tensor, weights: Tensor | None, patch_size: int, norm_pix: bool
) -> None:
    _check_loss("masked_patch_loss", pred, images, removed, weights, patch_size, norm_pix)


def check_masked_patch_loss_values(
    pred: Tensor, images: Tensor, removed: Tensor, weights: Tensor | None, patch_size: int, norm_pix: bool
) -> None:
    _check_removed_values("masked_patch_loss", images, removed, patch_size)


def check_masked_patch_loss_backward(
    grad: Tensor,
    pred: Tensor,
    images: Tensor,
    removed: Tensor,
    weights: Tensor | None,
    patch_size: int,
    norm_pix: bool,
) -> None:
    name = "masked_patch_loss_backward"
    _check_loss(name, pred, images, removed, weights, patch_size, norm_pix)
    _check_shape(name, "grad", grad, tuple(pred.shape[:2]))
    _check_dtype(name, "grad", grad, loss_dtype(pred))
    _check_device(name, "grad", grad, pred)


def check_masked_patch_loss_backward_values(
    grad: Tensor,
    pred: Tensor,
    images: Tensor,
    removed: Tensor,
    weights: Tensor | None,
    patch_size: int,
    norm_pix: bool,
) -> None:
    _check_removed_values("masked_patch_loss_backward", images, removed, patch_size)


def check_attention(qkv: Tensor) -> None:
    name = "attention"
    check_rank(name, "qkv", qkv, 5)
    _check_floating(name, "qkv", qkv)
    if qkv.shape[2] != 3:
        raise error(name, "qkv", f"shape {list(qkv.shape)}", "[any, any, 3, any, any]")


def loss_dtype(pred: Tensor) -> torch.dtype:
    """The precision in which errors are computed and returned: float32, or float64 for float64."""
    return torch.promote_types(pred.dtype, torch.float32)


def num_patches(operator: str, images: Tensor, patch_size: int) -> int:
    """L of an image batch [B, C, H, W], after checking that the patches tile it."""
    if patch_size < 1:
        raise error(operator, "patch_size", patch_size, "1 or more")
    check_rank(operator, "images", images, 4)
    height, width = images.shape[2:]
    if height % patch_size or width % patch_size:
        raise error(
            operator, "images", f"{height} x {width} pixels", f"multiples of {patch_size} (patch_size)"
        )
    return (height // patch_size) * (width // patch_size)


def _check_loss(
    name: str,
    pred: Tensor,
    images: Tensor,
    removed: Tensor,
    weights: Tensor | None,
    patch_size: int,
    norm_pix: bool,
) -> None:
    _check_floating(name, "pred", pred)
    _check_floating(name, "images", images)
    patches = num_patches(name, images, patch_size)
    batch, numbers = images.shape[0], patch_size**2 * images.shape[1]
    if removed.dtype == torch.int64:
        _check_ids(name, "removed", removed, (batch, None), pred)
    else:
        if removed.dtype != torch.float32:
            raise error(name, "removed", removed.dtype, "torch.float32 (a mask) or torch.int64 (positions)")
        _check_shape(name, "removed", removed, (batch, patches))
        _check_device(name, "removed", removed, pred)
    _check_shape(name, "pred", pred, (batch, removed.shape[1], numbers))
    _check_device(name, "images", images, pred)
    accepted = dict.fromkeys((pred.dtype, loss_dtype(pred)))
    if images.dtype not in accepted:
        raise error(name, "images", images.dtype, " or ".join(map(str, accepted)))
    if weights is not None:
        _check_shape(name, "weights", weights, tuple(removed.shape))
        _check_dtype(name, "weights", weights, loss_dtype(pred))
        _check_device(name, "weights", weights, pred)
    if norm_pix and numbers < 2:
        raise error(name, "patch_size", f"{patch_size} with norm_pix", "patches of 2 or more numbers")


def _check_removed_values(name: str, images: Tensor, removed: Tensor, patch_size: int) -> None:
    if removed.dtype == torch.int64:
        _check_range(name, "removed", removed, num_patches(name, images, patch_size))


def _check_like(operator: str, argument: str, tensor: Tensor, shape: Shape, other: Tensor) -> None:
    """Shape as given; dtype and device of ``other``."""
    _check_shape(operator, argument, tensor, shape)
    _check_dtype(operator, argument, tensor, other.dtype)
    _check_device(operator, argument, tensor, other)


def _check_ids(operator: str, argument: str, ids: Tensor, shape: Shape, other: Tensor) -> None:
    _check_dtype(operator, argument, ids, torch.int64)
    _check_shape(operator, argument, ids, shape)
    _check_device(operator, argument, ids, other)


def _check_floating(operator: str, argument: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise error(operator, argument, tensor.dtype, "a floating dtype")


def check_rank(operator: str, argument: str, tensor: Tensor, rank: int) -> None:
    if tensor.dim() != rank:
        raise error(operator, argument, f"shape {list(tensor.shape)}", f"{rank} dimensions")


def _check_shape(operator: str, argument: str, tensor: Tensor, shape: Shape) -> None:
    """``None`` in ``shape`` accepts any size."""
    check_rank(operator, argument, tensor, len(shape))
    if any(want is not None and got != want for got, want in zip(tensor.shape, shape, strict=True)):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise error(operator, argument, f"shape {list(tensor.shape)}", f"[{wanted}]")


def _check_dtype(operator: str, argument: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise error(operator, argument, tensor.dtype, str(dtype))


def _check_device(operator: str, argument: str, tensor: Tensor, other: Tensor) -> None:
    if tensor.device != other.device:
        raise error(operator, argument, f"a tensor on {tensor.device}", f"one on {other.device}")


def _check_range(operator: str, argument: str, ids: Tensor, patches: int) -> None:
    wrong = ids[(ids < 0) | (ids >= patches)]
    if len(wrong):
        raise error(operator, argument, int(wrong[0]), f"0 to {patches - 1}")


def _check_permutation(operator: str, argument: str, ids: Tensor) -> None:
    patches = ids.shape[1]
    _check_range(operator, argument, ids, patches)
    everything = torch.arange(patches, device=ids.device)
    wrong = (ids.sort(dim=1).values != everything).any(dim=1).nonzero()
    if len(wrong):
        raise error(
            operator, argument, f"repeated ranks in row {int(wrong[0])}", f"each of 0 to {patches - 1} once"
        )
