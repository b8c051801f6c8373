"""Forward-mode differentiation: exact up to the rounding of one pass, no radius to choose."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor
from torch.func import jvp

from mlomae.mlo.influence import PatchErrors
from mlomae.mlo.space import Vector


@torch.no_grad()
def forward_mode(errors: PatchErrors, direction: Vector, eps: Tensor) -> Tensor:
    """``D_v l(theta)`` [B, L] in one pass that carries a tangent beside every activation.

    Fused attention has no forward mode: the formula in plain PyTorch is used. ``eps`` has no effect.
    """
    space = errors.space
    point, direction_by_name = space.whole(errors.base()), space.whole(direction)
    # The other weights stay out: a tangent of zeros would cost as much as any other.
    names = [name for name in point if name.startswith(space.prefix)]
    tangents = {name: direction_by_name[name] for name in names}

    def function(moved: dict[str, Tensor]) -> Tensor:
        return errors.function({**point, **moved})

    with warnings.catch_warnings():
        # torch compiles some of its own forward-mode derivatives by a way that it has deprecated.
        warnings.filterwarnings("ignore", message=".torch.jit", category=FutureWarning)
        derivative: Tensor = jvp(function, ({name: point[name] for name in names},), (tangents,))[1]
    return derivative
