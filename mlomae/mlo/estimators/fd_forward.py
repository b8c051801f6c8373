"""One-sided finite difference: one forward pass, where the unperturbed errors are known."""

from __future__ import annotations

import torch
from torch import Tensor

from mlomae.mlo.influence import PatchErrors
from mlomae.mlo.space import Vector, perturbation


@torch.no_grad()
def forward_difference(errors: PatchErrors, direction: Vector, eps: Tensor) -> Tensor:
    """``(l(theta + eps v) - l(theta)) / eps`` [B, L].

    ``l(theta)`` is what the pretrain step computed, in the same precision as ``errors.evaluate``; where
    it is not known, it is evaluated. The error is ``O(eps)`` by truncation and ``O(1 / eps)`` by rounding,
    twice that of a central difference.
    """
    with perturbation(errors.space, errors.point, direction) as move:
        base = errors.values
        if base is None:
            move(torch.zeros_like(eps))
            base = errors.evaluate()
        move(eps)
        above = errors.evaluate()
    return (above - base) / eps
