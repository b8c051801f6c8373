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
from mlomae.models.encoder import ViTEncoder, init_linear, pool_features, run_blocks, sincos_positions
from mlomae.models.head import ClassifierHead
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
    """Level 1's module: its output is the reconstruction error of every removed patch.

    Args:
        num_classes: of a linear classifier on the mean of the kept patches' tokens (SupMAE: Liang et al.,
            arXiv 2205.14540); None for plain MAE.
    """

    def __init__(self, config: ModelConfig, num_classes: int | None = None) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.norm_pix = config.norm_pix
        self.encoder = ViTEncoder(config.arch, config.size, config.patch_size, config.in_chans)
        self.decoder = Decoder(config, self.encoder.embed_dim)
        self.predicts_all = config.predict == "all"
        replace_linear_layers(self)
        set_attention(self, config.attention)
        # Last: encoder and decoder start from the same weights without it.
        width = self.encoder.embed_dim
        self.classifier = None if num_classes is None else ClassifierHead(width, num_classes)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Whether blocks are computed again in the backward pass instead of keeping their activations."""
        self.encoder.grad_checkpointing = self.decoder.grad_checkpointing = enabled

    def reconstruct(self, images: Tensor, selection: PatchSelection) -> Tensor:
        """Predicted patches [B, L, P]; normalised with ``norm_pix``."""
        return self.decoder(self.encoder(images, selection.ids_keep), selection.ids_restore)

    def forward(
        self, images: Tensor, selection: PatchSelection, classify: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Per-patch errors and, on request, what the classifier says.

        Args:
            images: [B, C, H, W], normalised.
            selection: which patches are kept.
            classify: return logits too; only with a classifier.

        Returns:
            [B, L], float32 or float64: mean squared error of each removed patch, 0 at kept ones; with
            ``classify`` these and [B, classes].
        """
        latent = self.encoder(images, selection.ids_keep)
        errors = self._errors(latent, images, selection)
        if not classify:
            return errors
        assert self.classifier is not None
        return errors, self.classifier(pool_features(latent, "mean"))

    def _errors(self, latent: Tensor, images: Tensor, selection: PatchSelection) -> Tensor:
        """Of the patches that the decoder predicts from the latent [B, 1 + K, D]."""
        removed = None if self.predicts_all else selection.ids_removed
        # The loss is float32, whatever autocast did to the prediction.
        errors = mlomae_kernels.masked_patch_loss(
            self.decoder(latent, selection.ids_restore, removed),
            images,
            selection.mask if removed is None else removed,
            patch_size=self.patch_size,
            norm_pix=self.norm_pix,
        )
        if removed is None:
            return errors
        return errors.new_zeros(selection.mask.shape).scatter(1, removed, errors)
