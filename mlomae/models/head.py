"""The heads of level 2: a class for an image, or for each of its pixels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class ClassifierHead(nn.Module):
    """Linear classifier on pooled encoder features: [B, F] → [B, classes] logits."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.linear = _undecided(num_features, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features)


class SegmentationHead(nn.Module):
    """Linear classifier on patch tokens, upsampled to pixels: [B, L, D] → [B, classes, height, width] logits.

    Args:
        grid: rows and columns of the L patches.
        size: (height, width).
    """

    def __init__(
        self, num_features: int, num_classes: int, grid: tuple[int, int], size: tuple[int, int]
    ) -> None:
        super().__init__()
        self.linear = _undecided(num_features, num_classes)
        self.grid, self.size = grid, size

    def forward(self, features: Tensor) -> Tensor:
        logits = self.linear(features).transpose(1, 2).unflatten(2, self.grid)
        return F.interpolate(logits, self.size, mode="bilinear", align_corners=False)


def _undecided(num_features: int, num_classes: int) -> nn.Linear:
    """A linear layer that prefers no class before it is trained."""
    linear = nn.Linear(num_features, num_classes)
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
    return linear
