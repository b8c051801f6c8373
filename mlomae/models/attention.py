"""The attention of every block: timm's layer, computed by ``mlomae_kernels.attention``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

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
        return self.attend(self.qkv(x))

    def attend(self, qkv: Tensor, queries: int | None = None) -> Tensor:
        """What follows the packed projection.

        Args:
            qkv: [B, N, 3 D].
            queries: the first tokens, which attend to all; None for all.

        Returns:
            [B, queries or N, D].
        """
        packed = qkv.unflatten(2, (3, self.num_heads, self.head_dim))
        if queries is None:
            return self.proj(mlomae_kernels.attention(packed, self.backend).flatten(2))
        q, k, v = packed.permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(q[:, :, :queries], k, v)
        return self.proj(mixed.transpose(1, 2).flatten(2))


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
