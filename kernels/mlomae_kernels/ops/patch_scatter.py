"""The decoder's input, and its adjoint.

    full[b, 0]     = latent[b, 0] + decoder_pos_embed[0]
    full[b, 1 + l] = decoder_pos_embed[1 + l] + (latent[b, 1 + r] if r < K else mask_token)
                     with r = ids_restore[b, l]

The map is linear in latent, mask_token and decoder_pos_embed: its backward operator is its adjoint, and
the backward of that is the map itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlomae_kernels import checks, reference
from mlomae_kernels._registry import Operator


def _fake(latent: Tensor, mask_token: Tensor, ids_restore: Tensor, decoder_pos_embed: Tensor) -> Tensor:
    return latent.new_empty(latent.shape[0], 1 + ids_restore.shape[1], latent.shape[2])


def _fake_backward(
    grad: Tensor, ids_restore: Tensor, num_keep: int, need_pos: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, width = grad.shape
    return (
        grad.new_empty(batch, 1 + num_keep, width),
        grad.new_empty(1, 1, width),
        grad.new_empty(1, tokens, width) if need_pos else grad.new_empty(0),
    )


SCATTER = Operator(
    "patch_scatter(Tensor latent, Tensor mask_token, Tensor ids_restore, Tensor decoder_pos_embed) -> Tensor",
    reference=reference.patch_scatter,
    check=checks.check_patch_scatter,
    fake=_fake,
    check_values=checks.check_patch_scatter_values,
    promotes=True,
)
SCATTER_BACKWARD = Operator(
    "patch_scatter_backward(Tensor grad, Tensor ids_restore, SymInt num_keep, bool need_pos)"
    " -> (Tensor latent, Tensor mask_token, Tensor decoder_pos_embed)",
    reference=reference.patch_scatter_backward,
    check=checks.check_patch_scatter_backward,
    fake=_fake_backward,
    check_values=checks.check_patch_scatter_backward_values,
)


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, latent: Tensor, mask_token: Tensor, ids_restore: Tensor, decoder_pos_embed: Tensor
    ) -> Tensor:
        ctx.save_for_backward(ids_restore)
        ctx.num_keep = latent.shape[1] - 1
        return SCATTER.below_autograd(latent, mask_token, ids_restore, decoder_pos_embed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (ids_restore,) = ctx.saved_tensors
        need_pos = ctx.needs_input_grad[3]
        d_latent, d_mask_token, d_pos = SCATTER_BACKWARD.overload(grad, ids_restore, ctx.num_keep, need_pos)
        return d_latent, d_mask_token, None, d_pos if need_pos else None


class _ScatterBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, ids_restore: Tensor, num_keep: int, need_pos: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(ids_restore)
        ctx.need_pos = need_pos
        return SCATTER_BACKWARD.below_autograd(grad, ids_restore, num_keep, need_pos)

    @staticmethod
    def backward(ctx: Any, latent: Tensor, mask_token: Tensor, decoder_pos_embed: Tensor) -> Any:
        (ids_restore,) = ctx.saved_tensors
        if not ctx.need_pos:
            tokens = 1 + ids_restore.shape[1]
            decoder_pos_embed = latent.new_zeros(1, tokens, latent.shape[2])
        return SCATTER.overload(latent, mask_token, ids_restore, decoder_pos_embed), None, None, None


SCATTER.differentiate(_Scatter, (0, 1, 3))
SCATTER_BACKWARD.differentiate(_ScatterBackward, (0,))


def patch_scatter(
    latent: Tensor, mask_token: Tensor, ids_restore: Tensor, decoder_pos_embed: Tensor
) -> Tensor:
    """Puts kept tokens back in place, fills the gaps with the mask token, adds positions.

    The result is the decoder's input. One pass. Differentiable any number of times in ``latent``,
    ``mask_token`` and ``decoder_pos_embed``; deterministic.

    Args:
        latent: floating [B, 1 + K, D], the class token first.
        mask_token: [1, 1, D].
        ids_restore: int64 [B, L], a permutation in each row, as ``select_patches`` gives it.
        decoder_pos_embed: [1, 1 + L, D], the class token's position first.

    Returns:
        [B, 1 + L, D], the class token first, in the dtype that all arguments share (under autocast: the
        widest of theirs).

    Raises:
        ValueError: on a wrong shape, dtype or device.
        RuntimeError: on the CPU, where a row of ``ids_restore`` is no permutation. On a GPU a rank out of
            range gives a row of NaN; repeated ranks are found under MLOMAE_KERNELS_DEBUG=1 only.
    """
    full: Tensor = SCATTER.overload(latent, mask_token, ids_restore, decoder_pos_embed)
    return full
