"""Masking networks: from patch tokens to one bounded score per patch.

Two precautions keep the scores away from saturation, where the mask would stop learning:

* Scores are **centred per image** and bounded by ``bound * tanh(x / bound)``. A constant added to all
  scores of an image does not change which patches are removed; without centring that direction
  drifts until every probability is 0 or 1.
* Linear layers are **scaled by their fan-in** (weights of unit size, output divided by its square
  root), so that what one Adam step adds to an output grows with the root of the fan-in and not with
  the fan-in. With the usual scaling, 256 patches of width 768 saturate in one to three steps of 1e-3.

Letters: B batch, L patches, D token width, N hidden width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlomae.models.encoder import sincos_positions

if TYPE_CHECKING:  # networks take any object with these attributes: pydantic is not needed to build one
    from mlomae.sections import MaskingConfig


class ScaledLinear(nn.Module):
    """``y = W x / sqrt(fan_in) + b``; W starts as N(0, std²), b as 0."""

    def __init__(self, in_features: int, out_features: int, std: float = 1.0, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) * std)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x * self.weight.shape[1] ** -0.5, self.weight, self.bias)


class MaskingNetwork(nn.Module, ABC):
    """Scores patches: the higher, the sooner a patch is removed.

    Subclasses compute raw scores; this class centres and bounds them. The input is always detached
    from the autoencoder: the masking network looks at the image, not at the autoencoder's weights.
    """

    def __init__(self, bound: float) -> None:
        super().__init__()
        self.bound = bound

    @abstractmethod
    def raw_scores(self, tokens: Tensor) -> Tensor:
        """[B, L, D] tokens → [B, L] scores of any size."""

    def forward(self, tokens: Tensor) -> Tensor:
        """[B, L, D] patch tokens (before positions) → [B, L] scores within ±bound, float32 or float64.

        Autocast does not reach in: the mask step has to differentiate the scores that weighed the patches,
        and those are taken outside of it.
        """
        with torch.autocast(tokens.device.type, enabled=False):
            raw = self.raw_scores(tokens.to(torch.promote_types(tokens.dtype, torch.float32)))
        centred = raw - raw.mean(dim=1, keepdim=True)
        return self.bound * torch.tanh(centred / self.bound)


class MlpMaskingNetwork(MaskingNetwork):
    """The paper's network: all tokens flattened → hidden → one score per patch."""

    def __init__(self, num_patches: int, embed_dim: int, hidden: int, bound: float) -> None:
        super().__init__(bound)
        self.norm = nn.LayerNorm(embed_dim, elementwise_affine=False, eps=1e-6)
        self.hidden = ScaledLinear(num_patches * embed_dim, hidden)
        self.score = ScaledLinear(hidden, num_patches, std=0.2)

    def raw_scores(self, tokens: Tensor) -> Tensor:
        return self.score(F.relu(self.hidden(self.norm(tokens).flatten(1))))


class TokenMaskingNetwork(MaskingNetwork):
    """One small head shared by all patches; its size does not depend on their number.

    A patch is scored from its own content, its 3 by 3 neighbourhood, the mean of the image and its
    (fixed sin-cos) position.
    """

    def __init__(self, grid: tuple[int, int], embed_dim: int, hidden: int, bound: float) -> None:
        super().__init__(bound)
        self.grid = grid
        self.norm = nn.LayerNorm(embed_dim, elementwise_affine=False, eps=1e-6)
        self.embed = ScaledLinear(embed_dim, hidden)
        self.register_buffer("positions", sincos_positions(grid, hidden, prefix=0), persistent=False)
        self.neighbours = nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)
        self.context = ScaledLinear(hidden, hidden)
        # No bias: one number for all patches of an image is centred away.
        self.score = ScaledLinear(hidden, 1, std=0.2, bias=False)

    def raw_scores(self, tokens: Tensor) -> Tensor:
        x_BLN = self.embed(self.norm(tokens)) + self.positions
        x_BNL = x_BLN.transpose(1, 2)
        around_BLN = self.neighbours(x_BNL.unflatten(2, self.grid)).flatten(2).transpose(1, 2)
        image_B1N = self.context(x_BLN.mean(dim=1, keepdim=True))
        return self.score(F.gelu(x_BLN + around_BLN + image_B1N)).squeeze(2)


def build_masking_network(config: MaskingConfig, grid: tuple[int, int], embed_dim: int) -> MaskingNetwork:
    """The network named by ``masking.network``."""
    if config.network == "mlp":
        return MlpMaskingNetwork(grid[0] * grid[1], embed_dim, config.hidden, config.logit_bound)
    return TokenMaskingNetwork(grid, embed_dim, config.hidden, config.logit_bound)
