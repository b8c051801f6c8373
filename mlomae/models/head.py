"""The classifier of level 2."""

from __future__ import annotations

from torch import Tensor, nn


class ClassifierHead(nn.Module):
    """Linear classifier on pooled encoder features: [B, F] → [B, classes] logits."""

    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(num_features, num_classes)
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(features)
