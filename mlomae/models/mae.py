"""The masked autoencoder: encoder on the kept patches, light decoder on all of them.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022.
Letters: B batch, L patches, K kept patches, D encoder width, E decoder width, P values per patch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

import mlomae_kernels
from mlomae.models.attention import PackedAttention, set_attention
from mlomae.models.blocks import PredictionBlock, TransformerBlock
from mlomae.models.encoder import ViTEncoder, init_linear, run_blocks, sincos_positions
from mlomae.models.linear import replace_linear_layers
from mlomae.models.selection import PatchSelection

if TYPE_CHECKING:  # networks take any object with these attributes: pydantic is not needed to build one
    from mlomae.sections import ModelConfig


class Decoder(nn.Module):
    """Predicts the pixels of every patch from the latent of the kept ones."""

    def __init__(self, config: ModelConfig, embed_dim: int) -> None:
        super().__init__()
        width = config.decoder_dim
        self.embed = nn.Linear(embed_dim, width)
        self.mask_token = nn.Parameter(torch.empty(1, 1, width))
        self.pos_embed = nn.Parameter(sincos_positions(config.grid, width, prefix=1), requires_grad=False)
        kinds = [TransformerBlock] * (config.decoder_depth - 1) + [PredictionBlock]
        self.blocks = nn.ModuleList(
            kind(width, config.decoder_heads, qkv_bias=True, attn_layer=PackedAttention) for kind in kinds
        )
        # By timm's name for it.
        self.grad_checkpointing = False
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pred = nn.Linear(width, config.patch_size**2 * config.in_chans)
        nn.init.normal_(self.mask_token, std=0.02)
        self.apply(init_linear)

    def forward(self, latent: Tensor, ids_restore: Tensor, ids_removed: Tensor | None = None) -> Tensor:
        """Predicts all patches, or the removed ones only.

        Only the last block can leave patches out: what it attends to are all of them.

        Args:
            latent: [B, 1 + K, D].
            ids_restore: [B, L] inverse permutation.
            ids_removed: [B, L - K] positions to predict; None for all.

        Returns:
            [B, L, P] or [B, L - K, P] predicted patches.
        """
        x = mlomae_kernels.patch_scatter(self.embed(latent), self.mask_token, ids_restore, self.pos_embed)
        x = run_blocks(self.blocks[:-1], x, self.grad_checkpointing)
        return self.pred(self.norm(self.blocks[-1](x, ids_removed)))


class MaskedAutoencoder(nn.Module):
    """Level 1's module: its output is the reconstruction error of every removed patch."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.norm_pix = config.norm_pix
        self.encoder = ViTEncoder(config.arch, config.size, config.patch_size, config.in_chans)
        self.decoder = Decoder(config, self.encoder.embed_dim)
        self.predicts_all = config.predict == "all"
        replace_linear_layers(self)
        set_attention(self, config.attention)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Whether blocks are computed again in the backward pass instead of keeping their activations."""
        self.encoder.grad_checkpointing = self.decoder.grad_checkpointing = enabled

    def reconstruct(
        self, images: Tensor, selection: PatchSelection, ids_removed: Tensor | None = None
    ) -> Tensor:
        """Predicted patches [B, L, P] or, at ``ids_removed``, [B, L - K, P]; normalised with ``norm_pix``."""
        latent = self.encoder(images, selection.ids_keep)
        return self.decoder(latent, selection.ids_restore, ids_removed)

    def forward(self, images: Tensor, selection: PatchSelection) -> Tensor:
        """Per-patch errors.

        Args:
            images: [B, C, H, W], normalised.
            selection: which patches are kept.

        Returns:
            [B, L], float32 or float64: mean squared error of each removed patch, 0 at kept ones.
        """
        removed = None if self.predicts_all else selection.ids_removed
        # The loss is float32, whatever autocast did to the prediction.
        errors = mlomae_kernels.masked_patch_loss(
            self.reconstruct(images, selection, removed),
            images,
            selection.mask if removed is None else removed,
            patch_size=self.patch_size,
            norm_pix=self.norm_pix,
        )
        if removed is None:
            return errors
        return errors.new_zeros(selection.mask.shape).scatter(1, removed, errors)
