"""Ranks of scores in a row, by counting:

    rank[b, i]              = #{j : score[b, j] < score[b, i]} + #{j < i : score[b, j] = score[b, i]}
    mask[b, i]              = 0 if rank[b, i] < K else 1
    ids_keep[b, rank[b, i]] = i where rank[b, i] < K

Letters: B batch, L patches, K kept patches. Scores become integers in the same order first, with -0.0
as 0.0 and every NaN as the largest, so that comparisons are total and no rounding mode matters. A rank
needs L comparisons; no two ranks of a row are equal, so that the stores do not collide.
"""

# Kernels are typed by Triton when they are compiled.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mlomae_kernels.triton_ops import launch

# Patches ranked by one program, and patches they are compared with at a time. The interpreter's time goes
# by operations, not by numbers.
_BLOCK = 128 if launch.INTERPRETING else 32


@triton.jit
def _ordered_keys(scores, KEY_BITS: tl.constexpr):
    """Integers that compare as the scores do."""
    if KEY_BITS == 64:
        bits = scores.to(tl.int64, bitcast=True)
        magnitude = bits & 0x7FFFFFFFFFFFFFFF
        infinity = 0x7FF0000000000000
        largest = 0x7FFFFFFFFFFFFFFF
    else:
        bits = scores.to(tl.float32).to(tl.int32, bitcast=True)
        magnitude = bits & 0x7FFFFFFF
        infinity = 0x7F800000
        largest = 0x7FFFFFFF
    keys = tl.where(bits < 0, -magnitude, magnitude)  # both zeros become 0
    return tl.where(magnitude > infinity, largest, keys)


@triton.jit
def _select_patches_kernel(
    ids_keep_ptr,  # [B, K], contiguous
    ids_restore_ptr,  # [B, L], contiguous
    mask_ptr,  # [B, L], contiguous
    scores_ptr,  # [B, L]
    stride_scores_b, stride_scores_l,
    num_patches, num_keep,
    KEY_BITS: tl.constexpr, BLOCK_RANKED: tl.constexpr, BLOCK_OTHERS: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK_RANKED + tl.arange(0, BLOCK_RANKED)
    row_ptr = scores_ptr + b * stride_scores_b
    inside = i < num_patches
    ranked = tl.load(row_ptr + i.to(tl.int64) * stride_scores_l, mask=inside, other=0.0)
    key = _ordered_keys(ranked, KEY_BITS)[:, None]
    lower = tl.zeros([BLOCK_RANKED, BLOCK_OTHERS], tl.int32)
    for start in range(0, num_patches, BLOCK_OTHERS):
        j = start + tl.arange(0, BLOCK_OTHERS)
        # Beyond the row: NaN at a later position, which is never counted.
        others = tl.load(row_ptr + j.to(tl.int64) * stride_scores_l, mask=j < num_patches, other=float("nan"))
        other = _ordered_keys(others, KEY_BITS)[None, :]
        before = j[None, :] < i[:, None]
        lower += ((other < key) | ((other == key) & before)).to(tl.int32)
    rank = tl.sum(lower, axis=1)
    kept = rank < num_keep
    tl.store(ids_restore_ptr + b * num_patches + i, rank.to(tl.int64), mask=inside)
    tl.store(mask_ptr + b * num_patches + i, tl.where(kept, 0.0, 1.0), mask=inside)
    tl.store(ids_keep_ptr + b * num_keep + rank, i.to(tl.int64), mask=inside & kept)


def select_patches(scores: Tensor, num_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """The lowest scores of every row of [B, L], in the order of a stable ascending sort.

    Returns:
        ids_keep int64 [B, K], ids_restore int64 [B, L], mask float32 [B, L].
    """
    batch, patches = scores.shape
    ids_keep = scores.new_empty(batch, num_keep, dtype=torch.int64)
    ids_restore = scores.new_empty(batch, patches, dtype=torch.int64)
    mask = scores.new_empty(batch, patches, dtype=torch.float32)
    if scores.numel() == 0:
        return ids_keep, ids_restore, mask
    launch.run(
        _select_patches_kernel,
        (batch, launch.ceil_div(patches, _BLOCK)),
        ids_keep,
        ids_restore,
        mask,
        scores,
        *scores.stride(),
        patches,
        num_keep,
        KEY_BITS=64 if scores.dtype == torch.float64 else 32,
        BLOCK_RANKED=_BLOCK,
        BLOCK_OTHERS=_BLOCK,
        num_warps=4,
    )
    return ids_keep, ids_restore, mask
