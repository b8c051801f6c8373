"""Influence: the derivative of every patch's reconstruction error along a direction in weight space."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mlomae.mlo.perturb import global_norm, perturbation


@dataclass(frozen=True)
class Influence:
    """``values`` [B, L]: derivative of each patch's error along v; ``direction_norm``: ||v||, 0-dim."""

    values: Tensor
    direction_norm: Tensor


def central_difference(
    errors: Callable[[], Tensor],
    parameters: Sequence[Tensor],
    direction: Sequence[Tensor],
    relative_radius: float,
) -> Influence:
    """``(l(theta + eps v) - l(theta - eps v)) / (2 eps)`` with ``eps ||v|| = relative_radius * ||theta||``.

    Two evaluations without gradient; the parameters are restored bit for bit. The radius is relative
    to the norm of the perturbed weights, because the rounding error of a forward pass grows with it.

    Args:
        errors: evaluates the per-patch errors [B, L] at the present parameters. It must replay the
            same batch and the same patch selection at every call, draw nothing at random and, under
            autocast, open its own autocast context (a shared one would reuse cached weights).
        parameters: perturbed in place, then restored.
        direction: v, like ``parameters``.
        relative_radius: length of the perturbation divided by ``||theta||``.
    """
    norm = global_norm(direction)
    tiny = torch.finfo(norm.dtype).tiny
    eps = relative_radius * global_norm(parameters) / norm.clamp_min(tiny**0.5)
    with torch.no_grad(), perturbation(parameters, direction) as move:
        move(eps)
        above = errors()
        move(-eps)
        below = errors()
    return Influence((above - below) / (2 * eps), norm)
