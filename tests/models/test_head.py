"""The classifier head."""

from __future__ import annotations

import pytest
import torch

from mlomae.models.head import ClassifierHead


def test_head_starts_undecided_and_is_linear() -> None:
    head, features = ClassifierHead(64, 10), torch.randn(5, 64)
    logits = head(features)
    assert logits.shape == (5, 10)
    assert logits.softmax(dim=1).max() < 0.15  # no class is preferred before training
    torch.testing.assert_close(logits, features @ head.linear.weight.T)
    assert head.linear.weight.std().item() == pytest.approx(0.01, rel=0.1)
