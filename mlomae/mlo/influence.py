"""Influence: the derivative of every patch's reconstruction error along a direction in weight space.

The hypergradient needs no more of the pretrain level than this (docs/hypergradient.md):

    d L_val / d phi = -lr * sum_bi (m_bi / M) * (D_v l_bi) * d p_bi / d phi

One module per estimator, all with the same arguments (``mlomae.mlo.estimators``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mlomae.mlo.space import Vector, WeightSpace


@dataclass(frozen=True)
class PatchErrors:
    """The per-patch errors l(theta) of one batch, at a frozen selection, around one point.

    Attributes:
        space: the weights.
        point: theta at which the derivative is taken; None for the present weights.
        values: [B, L] errors at ``point``, if they are known.
        evaluate: errors [B, L] at the weights that the module holds. It must replay the same batch and
            selection at every call, draw nothing at random and, under autocast, open a context of its
            own (a shared one would reuse the cached weights of the call before).
        function: errors [B, L] as a function of whole weights by name; differentiable any number of
            times and in forward mode.
    """

    space: WeightSpace
    point: Vector | None
    values: Tensor | None
    evaluate: Callable[[], Tensor]
    function: Callable[[Mapping[str, Tensor]], Tensor]

    def base(self) -> Vector:
        """``point``, or the present weights themselves."""
        return self.space.values() if self.point is None else self.point


Estimator = Callable[[PatchErrors, Vector, Tensor], Tensor]
"""(errors, direction v, eps) → influence [B, L]; ``eps`` is the step length in units of v."""


def unit_step(space: WeightSpace, direction: Vector) -> tuple[Tensor, Tensor]:
    """``||theta|| / ||v||``, by which a relative radius becomes ``eps``, and ``||v||``; both 0-dim.

    The radius is relative to the norm of the weights that move, because the rounding error of a
    forward pass grows with it.
    """
    norm = space.norm(direction)
    tiny = torch.finfo(norm.dtype).tiny
    return space.scale() / norm.clamp_min(tiny**0.5), norm
