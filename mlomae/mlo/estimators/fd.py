"""Central finite difference: two forward passes without gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from mlomae.mlo.influence import PatchErrors
from mlomae.mlo.space import Vector, perturbation


@torch.no_grad()
def central_difference(errors: PatchErrors, direction: Vector, eps: Tensor) -> Tensor:
    """``(l(theta + eps v) - l(theta - eps v)) / (2 eps)`` [B, L].

    The error is ``O(eps²)`` by truncation and ``O(1 / eps)`` by rounding. The weights are restored bit
    for bit; no activation is kept.
    """
    with perturbation(errors.space, errors.point, direction) as move:
        move(eps)
        above = errors.evaluate()
        move(-eps)
        below = errors.evaluate()
    return (above - below) / (2 * eps)
