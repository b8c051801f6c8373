"""A masked autoencoder as one writes it from timm's blocks: what plain PyTorch gives without further thought.

Gather and argsort for the masks, torch's attention, all patches predicted, the loss in three lines.
He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022.
"""

from __future__ import annotations

import torch
from timm.layers import PatchEmbed
from timm.layers.pos_embed_sincos import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from benchmarks.gpu_parts.models import Model


class TimmAutoencoder(nn.Module):
    """Images [B, 3, H, W] → loss of the removed patches, 0-dim."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        width, inner, patch = model.width, model.decoder_dim, model.patch_size
        self.patch_size, self.num_keep = patch, model.num_keep
        self.patch_embed = PatchEmbed(model.img_size, patch, 3, width)
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.blocks = nn.Sequential(*(Block(width, model.heads, qkv_bias=True) for _ in range(model.depth)))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.decoder_embed = nn.Linear(width, inner)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, inner))
        self.decoder_blocks = nn.Sequential(
            *(Block(inner, model.decoder_heads, qkv_bias=True) for _ in range(model.decoder_depth))
        )
        self.decoder_norm = nn.LayerNorm(inner, eps=1e-6)
        self.predict = nn.Linear(inner, 3 * patch**2)
        side = model.img_size // patch
        for name, size in (("positions", width), ("decoder_positions", inner)):
            self.register_buffer(name, build_sincos2d_pos_embed([side, side], size)[None])

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch_embed(images) + self.positions
        batch, patches, width = tokens.shape
        order = torch.rand(batch, patches, device=images.device).argsort(dim=1)
        rank = order.argsort(dim=1)
        kept = order[:, : self.num_keep, None].expand(-1, -1, width)
        x = torch.cat([self.cls_token.expand(batch, -1, -1), tokens.gather(1, kept)], dim=1)
        x = self.decoder_embed(self.norm(self.blocks(x)))
        filler = self.mask_token.expand(batch, patches - self.num_keep, -1)
        seen = torch.cat([x[:, 1:], filler.to(x.dtype)], dim=1)
        seen = seen.gather(1, rank[:, :, None].expand(-1, -1, seen.shape[2])) + self.decoder_positions
        x = self.decoder_blocks(torch.cat([x[:, :1], seen.to(x.dtype)], dim=1))
        predicted = self.predict(self.decoder_norm(x))[:, 1:]
        errors = (predicted.float() - self._targets(images)).square().mean(dim=2)
        removed = (rank >= self.num_keep).float()
        return (errors * removed).sum() / removed.sum()

    def _targets(self, images: Tensor) -> Tensor:
        """[B, L, P]: patches, each normalised by its own mean and variance."""
        size = self.patch_size
        batch, channels, height, width = images.shape
        cells = images.reshape(batch, channels, height // size, size, width // size, size)
        patches = cells.permute(0, 2, 4, 3, 5, 1).reshape(batch, -1, size * size * channels)
        mean, variance = patches.mean(dim=2, keepdim=True), patches.var(dim=2, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()
