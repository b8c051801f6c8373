"""The encoder's input and its adjoint, with C' = 1 if there is a class token, else 0:

    out[b, 0]          = cls_token
    out[b, C' + k]     = tokens[b, ids_keep[b, k]] + pos_embed[ids_keep[b, k]]
    d_tokens[b, l]     = grad[b, C' + k] where ids_keep[b, k] = l, else 0
    d_pos[l], d_cls    = sum over b of d_tokens[b, l], of grad[b, 0]

Letters: B batch, L patches, K kept patches, D width, S programs that share the batch. Sums are float32
(float64 for float64). The ids of a row must be distinct; one out of range gives a row of NaN and moves
nothing backward. Every large tensor is read or written once.
"""

# Kernels are typed by Triton when they are compiled.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mlomae_kernels.triton_ops import launch

_NUMBERS = 4096
_NUMBERS_BACKWARD = 8192
# Images of one iteration of the backward: more bytes in flight for the same partial sums.
_IMAGES = 4
_MAX_BLOCK_IDS = 128


@triton.jit
def _patch_gather_kernel(
    out_ptr,  # [B, C' + K, D], contiguous
    tokens_ptr,  # [B, L, D]
    pos_ptr,  # [1, L, D] or None
    ids_ptr,  # [B, K]
    cls_ptr,  # [1, 1, D] or None
    stride_tokens_b, stride_tokens_l, stride_tokens_d,
    stride_pos_l, stride_pos_d,
    stride_ids_b, stride_ids_k,
    stride_cls_d,
    num_patches, num_keep, width,
    ACCUMULATOR: tl.constexpr, NUM_CLS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(2).to(tl.int64) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    out_ptr += b * (NUM_CLS + num_keep) * width + d
    patch = tl.load(ids_ptr + b * stride_ids_b + k * stride_ids_k, mask=k < num_keep, other=-1)
    found = ((patch >= 0) & (patch < num_patches))[:, None] & (d < width)[None, :]
    tokens_ptr += b * stride_tokens_b + d * stride_tokens_d
    row = tl.load(tokens_ptr[None, :] + patch[:, None] * stride_tokens_l, mask=found, other=float("nan"))
    if pos_ptr is not None:
        pos_ptr += d * stride_pos_d
        pos = tl.load(pos_ptr[None, :] + patch[:, None] * stride_pos_l, mask=found, other=0.0)
        row = row.to(ACCUMULATOR) + pos.to(ACCUMULATOR)
    inside = (k < num_keep)[:, None] & (d < width)[None, :]
    tl.store(out_ptr[None, :] + ((NUM_CLS + k) * width)[:, None], row, mask=inside)
    if NUM_CLS:
        first = (d < width) & (tl.program_id(1) == 0)
        tl.store(out_ptr, tl.load(cls_ptr + d * stride_cls_d, mask=first, other=0.0), mask=first)


@triton.jit
def _slots(ids_ptrs, in_batch, patch, num_patches, num_keep, stride_ids_k, BLOCK_IDS: tl.constexpr):
    """Place of each patch [R] among the ids of each image: int32 [images, R], -1 where it has none."""
    slot = tl.full([ids_ptrs.shape[0], patch.shape[0]], -1, tl.int32)
    for start in range(0, num_keep, BLOCK_IDS):
        k = start + tl.arange(0, BLOCK_IDS)
        ids = tl.load(
            ids_ptrs[:, None] + (k.to(tl.int64) * stride_ids_k)[None, :],
            mask=in_batch[:, None] & (k < num_keep)[None, :],
            other=-1,
        )
        ids = tl.where((ids >= 0) & (ids < num_patches), ids, -1).to(tl.int32)
        match = ids[:, None, :] == patch[None, :, None]
        slot = tl.maximum(slot, tl.max(tl.where(match, k[None, None, :], -1), axis=2))
    return slot


@triton.jit
def _patch_gather_backward_kernel(
    d_tokens_ptr,  # [B, L, D], contiguous
    d_pos_ptr,  # [S, L, D] in the accumulator's dtype, contiguous, or None
    grad_ptr,  # [B, C' + K, D]
    ids_ptr,  # [B, K]
    stride_grad_b, stride_grad_k, stride_grad_d,
    stride_ids_b, stride_ids_k,
    batch, num_patches, num_keep, width, images_per_program,
    ACCUMULATOR: tl.constexpr, NUM_CLS: tl.constexpr, IMAGES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, BLOCK_IDS: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    patch = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(2).to(tl.int64) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = (patch < num_patches)[:, None] & (d < width)[None, :]
    place = (patch.to(tl.int64) * width)[:, None] + d[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], ACCUMULATOR)
    first = split * images_per_program
    for start in range(first, tl.minimum(first + images_per_program, batch), IMAGES):
        b = (start + tl.arange(0, IMAGES)).to(tl.int64)
        slot = _slots(
            ids_ptr + b * stride_ids_b, b < batch, patch, num_patches, num_keep, stride_ids_k, BLOCK_IDS
        )
        offset = (b * stride_grad_b)[:, None] + (NUM_CLS + slot).to(tl.int64) * stride_grad_k
        rows = tl.load(
            grad_ptr + offset[:, :, None] + (d * stride_grad_d)[None, None, :],
            mask=(slot >= 0)[:, :, None] & inside[None, :, :],
            other=0.0,
        )
        tl.store(
            d_tokens_ptr + (b * num_patches * width)[:, None, None] + place[None, :, :],
            rows,
            mask=(b < batch)[:, None, None] & inside[None, :, :],
        )
        if d_pos_ptr is not None:
            total += tl.sum(rows.to(ACCUMULATOR), axis=0)
    if d_pos_ptr is not None:
        offset = split.to(tl.int64) * num_patches * width
        tl.store(d_pos_ptr + offset + place, total, mask=inside)


def patch_gather(
    tokens: Tensor, pos_embed: Tensor | None, ids_keep: Tensor, cls_token: Tensor | None
) -> Tensor:
    """tokens [B, L, D], pos_embed [1, L, D], ids_keep [B, K], cls_token [1, 1, D] → [B, C' + K, D]."""
    batch, patches, width = tokens.shape
    keep, num_cls = ids_keep.shape[1], int(cls_token is not None)
    out = tokens.new_empty(batch, num_cls + keep, width)
    if out.numel() == 0:
        return out
    tile = launch.row_tile(keep, width, tokens.dtype, _NUMBERS)
    launch.run(
        _patch_gather_kernel,
        (batch, max(launch.ceil_div(keep, tile.rows), 1), launch.ceil_div(width, tile.width)),
        out,
        tokens,
        pos_embed,
        ids_keep,
        cls_token,
        *tokens.stride(),
        *((0, 0) if pos_embed is None else pos_embed.stride()[1:]),
        *ids_keep.stride(),
        0 if cls_token is None else cls_token.stride(2),
        patches,
        keep,
        width,
        ACCUMULATOR=launch.accumulator(tokens.dtype),
        NUM_CLS=num_cls,
        BLOCK_ROWS=tile.rows,
        BLOCK_WIDTH=tile.width,
        num_warps=tile.num_warps,
    )
    return out


def patch_gather_backward(
    grad: Tensor, ids_keep: Tensor, num_patches: int, has_cls: bool, need_pos: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [B, C' + K, D] → d_tokens [B, L, D], d_pos [1, L, D] or [0], d_cls [1, 1, D] or [0]."""
    batch, _, width = grad.shape
    keep, dtype = ids_keep.shape[1], launch.accumulator_dtype(grad.dtype)
    d_tokens = grad.new_empty(batch, num_patches, width)
    d_cls = grad[:, :1].sum(0, keepdim=True, dtype=dtype).to(grad.dtype) if has_cls else grad.new_empty(0)
    if d_tokens.numel() == 0:
        return d_tokens, grad.new_zeros(1, num_patches, width) if need_pos else grad.new_empty(0), d_cls
    images = min(_IMAGES, launch.power_of_two(batch))
    tile = launch.row_tile(num_patches, width, grad.dtype, _NUMBERS_BACKWARD, images)
    blocks = launch.ceil_div(num_patches, tile.rows), launch.ceil_div(width, tile.width)
    split = launch.BatchSplit(launch.ceil_div(batch, images), images)
    partial = None
    if need_pos:
        split = launch.split_batch(batch, images, blocks[0] * blocks[1], tile, grad)
        partial = grad.new_empty(split.splits, num_patches, width, dtype=dtype)
    launch.run(
        _patch_gather_backward_kernel,
        (split.splits, *blocks),
        d_tokens,
        partial,
        grad,
        ids_keep,
        *grad.stride(),
        *ids_keep.stride(),
        batch,
        num_patches,
        keep,
        width,
        split.images,
        ACCUMULATOR=launch.accumulator(grad.dtype),
        NUM_CLS=int(has_cls),
        IMAGES=images,
        BLOCK_ROWS=tile.rows,
        BLOCK_WIDTH=tile.width,
        BLOCK_IDS=min(launch.power_of_two(keep), _MAX_BLOCK_IDS),
        num_warps=tile.num_warps,
    )
    d_pos = grad.new_empty(0) if partial is None else partial.sum(0, keepdim=True).to(grad.dtype)
    return d_tokens, d_pos, d_cls
