"""The decoder's input and its adjoint, with r = ids_restore[b, l]:

    out[b, 0]         = latent[b, 0] + pos[0]
    out[b, 1 + l]     = (latent[b, 1 + r] if r < K else mask_token) + pos[1 + l]
    d_latent[b, 0]    = grad[b, 0],   d_latent[b, 1 + r] = grad[b, 1 + l] where r < K
    d_mask_token      = sum over b, l with r >= K of grad[b, 1 + l],   d_pos = sum over b of grad[b]

Letters: B batch, L patches, K kept patches, D width, S programs that share the batch, R blocks of rows.
A row t is the class token (t = 0) or patch t - 1. Sums are float32 (float64 for float64). A row of ranks
must be a permutation; one out of range gives a row of NaN, and backward a NaN in d_mask_token. Every
large tensor is read or written once.
"""

# Kernels are typed by Triton when they are compiled.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mlomae_kernels.triton_ops import launch

_NUMBERS = 4096
_NUMBERS_BACKWARD = 4096
# Images of a program, so that a position is read once for all of them.
_IMAGES = 4
# Images of one iteration of the backward: more bytes in flight for the same partial sums.
_IMAGES_BACKWARD = 4


@triton.jit
def _ranks(ids_ptr, b, t, stride_ids_b, stride_ids_l, batch, num_patches):
    """Rank of row t of image b, -1 for the class token: [B', T']."""
    is_patch = (t >= 1) & (t <= num_patches)
    return tl.load(
        ids_ptr + (b * stride_ids_b)[:, None] + ((t - 1) * stride_ids_l)[None, :],
        mask=(b < batch)[:, None] & is_patch[None, :],
        other=-1,
    )


@triton.jit
def _patch_scatter_kernel(
    out_ptr,  # [B, 1 + L, D], contiguous
    latent_ptr,  # [B, 1 + K, D]
    mask_token_ptr,  # [1, 1, D]
    ids_ptr,  # [B, L]
    pos_ptr,  # [1, 1 + L, D]
    stride_latent_b, stride_latent_k, stride_latent_d,
    stride_mask_token_d,
    stride_ids_b, stride_ids_l,
    stride_pos_t, stride_pos_d,
    batch, num_patches, num_keep, width,
    ACCUMULATOR: tl.constexpr, IMAGES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * IMAGES + tl.arange(0, IMAGES)
    t = tl.program_id(1).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(2).to(tl.int64) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    in_width = (d < width)[None, None, :]
    in_rows = (t <= num_patches)[None, :, None]
    in_batch = (b < batch)[:, None, None]
    rank = _ranks(ids_ptr, b, t, stride_ids_b, stride_ids_l, batch, num_patches)[:, :, None]
    kept = (rank < num_keep) & ((rank >= 0) | (t == 0)[None, :, None]) & in_batch
    masked = (rank >= num_keep) & (rank < num_patches)
    row = tl.load(
        latent_ptr
        + (b * stride_latent_b)[:, None, None]
        + (rank + 1) * stride_latent_k
        + (d * stride_latent_d)[None, None, :],
        mask=kept & in_width,
        other=float("nan"),
    ).to(ACCUMULATOR)
    mask_token = tl.load(mask_token_ptr + d * stride_mask_token_d, mask=d < width, other=0.0)
    row = tl.where(masked, mask_token.to(ACCUMULATOR)[None, None, :], row)
    pos = tl.load(
        pos_ptr + (t * stride_pos_t)[None, :, None] + (d * stride_pos_d)[None, None, :],
        mask=in_rows & in_width,
        other=0.0,
    )
    offset = (b * (1 + num_patches) * width)[:, None, None] + (t * width)[None, :, None]
    tl.store(
        out_ptr + offset + d[None, None, :],
        row + pos.to(ACCUMULATOR),
        mask=in_batch & in_rows & in_width,
    )


@triton.jit
def _patch_scatter_backward_kernel(
    d_latent_ptr,  # [B, 1 + K, D], contiguous
    d_mask_token_ptr,  # [S, R, D] in the accumulator's dtype, contiguous
    d_pos_ptr,  # [S, 1 + L, D] in the accumulator's dtype, contiguous, or None
    grad_ptr,  # [B, 1 + L, D]
    ids_ptr,  # [B, L]
    stride_grad_b, stride_grad_t, stride_grad_d,
    stride_ids_b, stride_ids_l,
    batch, num_patches, num_keep, width, images_per_program,
    ACCUMULATOR: tl.constexpr, IMAGES: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    split = tl.program_id(0)
    t = tl.program_id(1).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(2).to(tl.int64) * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
    inside = (t <= num_patches)[:, None] & (d < width)[None, :]
    place = (t * stride_grad_t)[:, None] + (d * stride_grad_d)[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], ACCUMULATOR)
    filled = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], ACCUMULATOR)
    first = split * images_per_program
    for start in range(first, tl.minimum(first + images_per_program, batch), IMAGES):
        b = (start + tl.arange(0, IMAGES)).to(tl.int64)
        in_batch = (b < batch)[:, None, None]
        rank = _ranks(ids_ptr, b, t, stride_ids_b, stride_ids_l, batch, num_patches)[:, :, None]
        is_cls = (t == 0)[None, :, None]
        kept = (rank < num_keep) & ((rank >= 0) | is_cls)
        row = tl.load(
            grad_ptr + (b * stride_grad_b)[:, None, None] + place[None, :, :],
            mask=in_batch & inside[None, :, :],
            other=0.0,
        )
        tl.store(
            d_latent_ptr
            + (b * (1 + num_keep) * width)[:, None, None]
            + (rank + 1) * width
            + d[None, None, :],
            row,
            mask=kept & in_batch & inside[None, :, :],
        )
        row = row.to(ACCUMULATOR)
        if d_pos_ptr is not None:
            total += tl.sum(row, axis=0)
        is_patch = ((t >= 1) & (t <= num_patches))[None, :, None] & in_batch
        wrong = ((rank < 0) & is_patch) | (rank >= num_patches)
        filled += tl.sum(tl.where(kept, 0.0, tl.where(wrong, float("nan"), row)), axis=0)
    place = split.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(d_mask_token_ptr + place * width + d, tl.sum(filled, axis=0), mask=d < width)
    if d_pos_ptr is not None:
        offset = (split.to(tl.int64) * (1 + num_patches) + t) * width
        tl.store(d_pos_ptr + offset[:, None] + d[None, :], total, mask=inside)


def patch_scatter(
    latent: Tensor, mask_token: Tensor, ids_restore: Tensor, decoder_pos_embed: Tensor
) -> Tensor:
    """latent [B, 1 + K, D], mask_token [1, 1, D], ids_restore [B, L], pos [1, 1 + L, D] → [B, 1 + L, D]."""
    batch, tokens, width = latent.shape
    patches = ids_restore.shape[1]
    out = latent.new_empty(batch, 1 + patches, width)
    if out.numel() == 0:
        return out
    images = min(_IMAGES, launch.power_of_two(batch))
    tile = launch.row_tile(1 + patches, width, latent.dtype, _NUMBERS, images)
    blocks = launch.ceil_div(1 + patches, tile.rows), launch.ceil_div(width, tile.width)
    launch.run(
        _patch_scatter_kernel,
        (launch.ceil_div(batch, images), *blocks),
        out,
        latent,
        mask_token,
        ids_restore,
        decoder_pos_embed,
        *latent.stride(),
        mask_token.stride(2),
        *ids_restore.stride(),
        *decoder_pos_embed.stride()[1:],
        batch,
        patches,
        tokens - 1,
        width,
        ACCUMULATOR=launch.accumulator(latent.dtype),
        IMAGES=images,
        BLOCK_ROWS=tile.rows,
        BLOCK_WIDTH=tile.width,
        num_warps=tile.num_warps,
    )
    return out


def patch_scatter_backward(
    grad: Tensor, ids_restore: Tensor, num_keep: int, need_pos: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [B, 1 + L, D] → d_latent [B, 1 + K, D], d_mask_token [1, 1, D], d_pos [1, 1 + L, D] or [0]."""
    batch, tokens, width = grad.shape
    dtype = launch.accumulator_dtype(grad.dtype)
    d_latent = grad.new_empty(batch, 1 + num_keep, width)
    if d_latent.numel() == 0:
        d_pos = grad.new_zeros(1, tokens, width) if need_pos else grad.new_empty(0)
        return d_latent, grad.new_zeros(1, 1, width), d_pos
    images = min(_IMAGES_BACKWARD, launch.power_of_two(batch))
    tile = launch.row_tile(tokens, width, grad.dtype, _NUMBERS_BACKWARD, images)
    blocks = launch.ceil_div(tokens, tile.rows), launch.ceil_div(width, tile.width)
    split = launch.split_batch(batch, images, blocks[0] * blocks[1], tile, grad)
    partial = grad.new_empty(split.splits, blocks[0], width, dtype=dtype)
    partial_pos = grad.new_empty(split.splits, tokens, width, dtype=dtype) if need_pos else None
    launch.run(
        _patch_scatter_backward_kernel,
        (split.splits, *blocks),
        d_latent,
        partial,
        partial_pos,
        grad,
        ids_restore,
        *grad.stride(),
        *ids_restore.stride(),
        batch,
        tokens - 1,
        num_keep,
        width,
        split.images,
        ACCUMULATOR=launch.accumulator(grad.dtype),
        IMAGES=images,
        BLOCK_ROWS=tile.rows,
        BLOCK_WIDTH=tile.width,
        num_warps=tile.num_warps,
    )
    d_mask_token = partial.sum((0, 1)).view(1, 1, width).to(grad.dtype)
    d_pos = grad.new_empty(0) if partial_pos is None else partial_pos.sum(0, keepdim=True).to(grad.dtype)
    return d_latent, d_mask_token, d_pos
