"""The one table of tolerances.

A bound is changed here, with the measured error and the reason in the same row, never in a test. What is
not in the table is compared exactly.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Bound(NamedTuple):
    """``|actual - expected| <= atol + rtol * |expected|``, and why it is not tighter."""

    rtol: float
    atol: float
    why: str


BOUNDS: dict[tuple[str, torch.dtype], Bound] = {
    ("masked_patch_loss", torch.float64): Bound(1e-12, 1e-14, "sums of at most 10^3 terms, other order"),
    ("masked_patch_loss", torch.float32): Bound(1e-5, 1e-6, "float32 statistics against float64"),
    ("masked_patch_loss/d_pred", torch.float64): Bound(
        1e-12, 1e-14, "sums of at most 10^3 terms, other order"
    ),
    ("masked_patch_loss/d_pred", torch.float32): Bound(1e-5, 1e-6, "float32 statistics against float64"),
    ("masked_patch_loss/d_pred", torch.bfloat16): Bound(
        2**-7, 1e-6, "one rounding, in Triton's interpreter cut"
    ),
    ("masked_patch_loss/d_pred", torch.float16): Bound(2**-10, 1e-6, "one rounding; subnormals below 6e-5"),
    ("attention", torch.float32): Bound(1e-5, 2e-6, "softmax over at most 50 tokens in float32"),
}


def assert_within(operation: str, actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """Compares in float64 within the bound of (operation, ``dtype``, by default that of ``actual``)."""
    bound = BOUNDS[operation, dtype or actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=bound.rtol, atol=bound.atol)
