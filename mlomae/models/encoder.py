"""The ViT encoder: a timm ``VisionTransformer`` that can be run on a subset of its patches.

Letters: B batch, L patches, K kept patches, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import mlomae_kernels
from mlomae.models.attention import PackedAttention
from mlomae.models.blocks import TransformerBlock, recomputed

# (embed_dim, depth, num_heads); all but the two smallest are timm's sizes of that name.
SIZES: dict[str, tuple[int, int, int]] = {
    "vit_pico": (64, 2, 4),
    "vit_micro": (96, 4, 4),
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_huge": (1280, 32, 16),
}

_POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "cls": lambda tokens: tokens[:, 0],
    "mean": lambda tokens: tokens[:, 1:].mean(dim=1),
    "patches": lambda tokens: tokens[:, 1:],
}


class ViTEncoder(VisionTransformer):
    """Encoder whose state dict is that of the timm ViT of the same size (``num_classes=0``).

    Positions are fixed sin-cos tables stored in timm's ``pos_embed`` (He et al. 2022, app. A.1), so
    any patch grid works, square or not.
    """

    # timm declares these optional; with a class token and learned positions they are always there.
    cls_token: nn.Parameter
    pos_embed: nn.Parameter

    def __init__(self, arch: str, img_size: tuple[int, int], patch_size: int, in_chans: int) -> None:
        embed_dim, depth, num_heads = SIZES[arch]
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            num_classes=0,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            weight_init="skip",
            attn_layer=PackedAttention,
            block_fn=TransformerBlock,
        )
        self.pos_embed.requires_grad_(False)
        self.pos_embed.copy_(sincos_positions(self.patch_embed.grid_size, embed_dim, prefix=1))
        nn.init.normal_(self.cls_token, std=0.02)
        # MAE initialises the patch projection as if it were a linear layer.
        projection = self.patch_embed.proj.weight
        nn.init.xavier_uniform_(projection.view(projection.shape[0], -1))
        self.apply(init_linear)

    # timm's second argument is an attention mask; ours is the list of kept patches.
    def forward(  # type: ignore[override]
        self, images: Tensor, ids_keep: Tensor | None = None, pool: str | None = None
    ) -> Tensor:
        """Encodes the kept patches, or all of them.

        Args:
            images: [B, C, H, W].
            ids_keep: [B, K] indices of the kept patches; None keeps all in order.
            pool: what is made of the tokens, see ``pool_features``; None for the tokens themselves.

        Returns:
            [B, 1 + K, D] normalised tokens, CLS first; with ``pool`` features.
        """
        tokens = self.patch_embed(images)
        if ids_keep is None:
            x = self._pos_embed(tokens)
        else:
            cls_token = self.cls_token + self.pos_embed[:, :1]
            x = mlomae_kernels.patch_gather(tokens, self.pos_embed[:, 1:], ids_keep, cls_token)
        if pool is None:
            return self.norm(run_blocks(self.blocks, x, self.grad_checkpointing))
        *blocks, last = self.blocks
        x = run_blocks(blocks, x, self.grad_checkpointing, lean=True)
        # Where the class token alone is read, the last block computes nothing else.
        x = last(x, lean=True, queries=1 if pool == "cls" else None)
        return pool_features(self.norm(x), pool)


def run_blocks(blocks: Iterable[nn.Module], x: Tensor, checkpointing: bool, lean: bool = False) -> Tensor:
    """Tokens [B, N, D] through blocks of one width.

    Args:
        checkpointing: keep each block's input only and compute it again in the backward pass.
        lean: see ``TransformerBlock``.
    """
    for block in blocks:
        x = recomputed(partial(block, lean=lean), x) if checkpointing else block(x, lean=lean)
    return x


def pool_features(tokens: Tensor, pool: str) -> Tensor:
    """[B, 1 + L, D] encoder tokens → [B, F]: CLS token, mean of the patch tokens, or both (F = 2D).

    ``patches`` are the patch tokens themselves, [B, L, D].
    """
    return torch.cat([_POOLS[name](tokens) for name in pool.split("+")], dim=1)


def num_pooled(embed_dim: int, pool: str) -> int:
    """F of ``pool_features``."""
    return embed_dim * len(pool.split("+"))


def sincos_positions(grid: tuple[int, int], dim: int, prefix: int) -> Tensor:
    """Two-dimensional sin-cos table [1, prefix + L, dim]; zeros for the prefix tokens."""
    table = build_sincos2d_pos_embed(list(grid), dim)
    return torch.cat([table.new_zeros(prefix, dim), table])[None]


def init_linear(module: nn.Module) -> None:
    """Xavier-uniform weights and zero biases for every linear layer (He et al. 2022)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
