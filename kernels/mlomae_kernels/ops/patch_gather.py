"""The encoder's input, and its adjoint.

    visible[b, 0]     = cls_token
    visible[b, 1 + k] = tokens[b, ids_keep[b, k]] + pos_embed[ids_keep[b, k]]

The map is linear in tokens, pos_embed and cls_token, so its backward operator is its adjoint, and the
backward of that is the map itself: differentiable any number of times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mlomae_kernels import checks, reference
from mlomae_kernels._registry import Operator


def _fake(tokens: Tensor, pos_embed: Tensor | None, ids_keep: Tensor, cls_token: Tensor | None) -> Tensor:
    batch, _, width = tokens.shape
    return tokens.new_empty(batch, ids_keep.shape[1] + int(cls_token is not None), width)


def _fake_backward(
    grad: Tensor, ids_keep: Tensor, num_patches: int, has_cls: bool, need_pos: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, _, width = grad.shape
    return (
        grad.new_empty(batch, num_patches, width),
        grad.new_empty(1, num_patches, width) if need_pos else grad.new_empty(0),
        grad.new_empty(1, 1, width) if has_cls else grad.new_empty(0),
    )


GATHER = Operator(
    "patch_gather(Tensor tokens, Tensor? pos_embed, Tensor ids_keep, Tensor? cls_token) -> Tensor",
    reference=reference.patch_gather,
    check=checks.check_patch_gather,
    fake=_fake,
    check_values=checks.check_patch_gather_values,
    promotes=True,
)
GATHER_BACKWARD = Operator(
    "patch_gather_backward(Tensor grad, Tensor ids_keep, SymInt num_patches, bool has_cls, bool need_pos)"
    " -> (Tensor tokens, Tensor pos_embed, Tensor cls_token)",
    reference=reference.patch_gather_backward,
    check=checks.check_patch_gather_backward,
    fake=_fake_backward,
    check_values=checks.check_patch_gather_backward_values,
)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, tokens: Tensor, pos_embed: Tensor | None, ids_keep: Tensor, cls_token: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(ids_keep)
        ctx.num_patches, ctx.has_cls = tokens.shape[1], cls_token is not None
        return GATHER.below_autograd(tokens, pos_embed, ids_keep, cls_token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        (ids_keep,) = ctx.saved_tensors
        need_pos = ctx.needs_input_grad[1]
        d_tokens, d_pos, d_cls = GATHER_BACKWARD.overload(
            grad, ids_keep, ctx.num_patches, ctx.has_cls, need_pos
        )
        return d_tokens, d_pos if need_pos else None, None, d_cls if ctx.has_cls else None


class _GatherBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, ids_keep: Tensor, num_patches: int, has_cls: bool, need_pos: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(ids_keep)
        ctx.has_cls, ctx.need_pos = has_cls, need_pos
        return GATHER_BACKWARD.below_autograd(grad, ids_keep, num_patches, has_cls, need_pos)

    @staticmethod
    def backward(ctx: Any, tokens: Tensor, pos_embed: Tensor, cls_token: Tensor) -> Any:
        (ids_keep,) = ctx.saved_tensors
        visible = GATHER.overload(
            tokens, pos_embed if ctx.need_pos else None, ids_keep, cls_token if ctx.has_cls else None
        )
        return visible, None, None, None, None


GATHER.differentiate(_Gather, (0, 1, 3))
GATHER_BACKWARD.differentiate(_GatherBackward, (0,))


def patch_gather(
    tokens: Tensor, pos_embed: Tensor | None, ids_keep: Tensor, cls_token: Tensor | None
) -> Tensor:
    """Adds positions, picks the kept tokens and prepends the class token: the encoder's input.

    One pass: reads the kept tokens only. Differentiable any number of times in ``tokens``,
    ``pos_embed`` and ``cls_token``; deterministic.

    Args:
        tokens: floating [B, L, D].
        pos_embed: [1, L, D] added to the tokens, or None.
        ids_keep: int64 [B, K], distinct in each row, as ``select_patches`` gives them.
        cls_token: [1, 1, D] prepended as it is (with its position already added), or None.

    Returns:
        [B, K, D], or [B, 1 + K, D] with a class token, in the dtype that all arguments share (under
        autocast: the widest of theirs).

    Raises:
        ValueError: on a wrong shape, dtype or device.
        RuntimeError: on an index out of range on the CPU; on a GPU its row is NaN.
    """
    visible: Tensor = GATHER.overload(tokens, pos_embed, ids_keep, cls_token)
    return visible
