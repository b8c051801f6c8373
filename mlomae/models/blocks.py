"""The transformer block of the autoencoder: timm's, and two ways to compute less or keep less.

All of a block happens inside its call, its weights are read nowhere else: under ZeRO 3 they exist only
while a call lasts, and hooks around the call gather them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers.mlp import Mlp
from timm.models.vision_transformer import Block
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mlomae_kernels
from mlomae.models.attention import PackedAttention


class TransformerBlock(Block):
    """timm's block without drop path and layer scale, and its state dict."""

    # timm's second argument is an attention mask, for which an autoencoder that drops its patches has no use.
    def forward(  # type: ignore[override]
        self, x: Tensor, lean: bool = False, queries: int | None = None
    ) -> Tensor:
        """[B, N, D] → [B, queries or N, D].

        Args:
            lean: keep 10 numbers per token and channel for the backward pass instead of 16: the inputs of
                linear layers are cheap functions (normalisation, GELU) of what is kept anyway and are
                computed again.
            queries: with ``lean``, the first tokens, which alone are computed; None for all.
        """
        if not lean:
            x = x + self.attn(self.norm1(x))
            return x + self.mlp(self.norm2(x))
        attention, mlp = self.attn, self.mlp
        assert isinstance(attention, PackedAttention) and isinstance(mlp, Mlp)
        qkv = recomputed(lambda x: _plain_linear(attention.qkv, self.norm1(x)), x)
        x = x[:, :queries] + attention.attend(qkv, queries)
        hidden = recomputed(lambda x: _plain_linear(mlp.fc1, self.norm2(x)), x)
        return x + recomputed(lambda hidden: _plain_linear(mlp.fc2, mlp.act(hidden)), hidden)


class PredictionBlock(Block):
    """The decoder's last block: what it attends to are all tokens, what it computes is the patches."""

    def forward(  # type: ignore[override]
        self, x: Tensor, ids: Tensor | None = None
    ) -> Tensor:
        """[B, 1 + L, E] tokens → [B, L, E] patches or, at positions ``ids`` [B, R], [B, R, E]."""
        x = x + self.attn(self.norm1(x))
        x = x[:, 1:]
        if ids is not None:
            x = mlomae_kernels.patch_gather(x, None, ids, None)
        return x + self.mlp(self.norm2(x))


def recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)``, of which the backward pass keeps ``x`` only."""
    if not torch.is_grad_enabled():
        return function(x)
    result: Tensor = checkpoint(function, x, use_reentrant=False, preserve_rng_state=False)
    return result


def _plain_linear(layer: nn.Module, x: Tensor) -> Tensor:
    """torch's own product. It saves its input before it multiplies, where recomputation stops: the product of
    ``mlomae_kernels.linear``, a Python function of autograd's, would be taken a second time.
    """
    assert isinstance(layer, nn.Linear)
    return F.linear(x, layer.weight, layer.bias)
