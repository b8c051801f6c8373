"""The attention of every block: timm's layer, computed by ``mlomae_kernels.attention``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from timm.layers.attention import Attention
from torch import Tensor, nn

import mlomae_kernels


class PackedAttention(Attention):
    """timm's attention, and its state dict, on queries, keys and values as the linear layer packs them.

    Attributes:
        backend: of ``mlomae_kernels.attention``; see ``set_attention``.
    """

    backend = "auto"

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, D] → [B, N, D]. An autoencoder that drops its patches has no use for timm's masks."""
        if attn_mask is not None or is_causal:
            raise ValueError("attention: attn_mask, is_causal: got a mask, expected none")
        batch, tokens, _ = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.num_heads, self.head_dim)
        return self.proj(mlomae_kernels.attention(qkv, self.backend).flatten(2))


def set_attention(module: nn.Module, backend: str) -> None:
    """Makes every attention layer of a module use a back end of ``mlomae_kernels.attention``."""
    for layer in module.modules():
        if isinstance(layer, PackedAttention):
            layer.backend = backend


@contextmanager
def using_attention(module: nn.Module, backend: str) -> Iterator[None]:
    """Within the context, every attention layer of a module uses this back end."""
    layers = [layer for layer in module.modules() if isinstance(layer, PackedAttention)]
    before = [layer.backend for layer in layers]
    try:
        set_attention(module, backend)
        yield
    finally:
        for layer, name in zip(layers, before, strict=True):
            layer.backend = name
