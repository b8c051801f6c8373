"""Double backward: the reference for tests and tiny models."""

from __future__ import annotations

import torch
from torch import Tensor

from mlomae.mlo.influence import PatchErrors
from mlomae.mlo.space import Vector


@torch.enable_grad()
def double_backward(errors: PatchErrors, direction: Vector, eps: Tensor) -> Tensor:
    """``D_v l(theta)`` [B, L]: with dummy cotangents u, the derivative of ``<grad_theta <u, l>, v>`` in u.

    Keeps the graph of a backward pass, several times the memory of a training step.
    """
    space = errors.space
    point, direction_by_name = space.whole(errors.base()), space.whole(direction)
    leaves = {name: w.detach().requires_grad_() for name, w in point.items() if name.startswith(space.prefix)}
    values = errors.function({**point, **leaves})
    u = torch.ones_like(values, requires_grad=True)
    grads = torch.autograd.grad(values, list(leaves.values()), u, create_graph=True)
    product = torch.stack(
        [(g * direction_by_name[name]).sum() for name, g in zip(leaves, grads, strict=True)]
    ).sum()
    (influence,) = torch.autograd.grad(product, u)
    return influence.detach()
