"""Optimisers of many classifiers at once: one step of all of them, each with its own learning rate.

torch's own take one rate for a whole tensor. Letters: K classifiers; tensors are [K, …].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

BETAS, EPS = (0.9, 0.999), 1e-8  # of AdamW
MOMENTUM, TRUST = 0.9, 1e-3  # of LARS
Step = Callable[[Tensor, Tensor, list[Tensor], Tensor, int, float], None]
"""(parameter, gradient, moments, rates [K], steps before, weight decay); changes the first and the third."""


def adamw(
    parameter: Tensor, gradient: Tensor, moments: list[Tensor], rates: Tensor, step: int, weight_decay: float
) -> None:
    """AdamW (Loshchilov & Hutter 2019); vectors [K, C] are not decayed."""
    mean, square = moments
    mean.lerp_(gradient, 1 - BETAS[0])
    square.mul_(BETAS[1]).addcmul_(gradient, gradient, value=1 - BETAS[1])
    first, second = 1 - BETAS[0] ** (step + 1), 1 - BETAS[1] ** (step + 1)
    rate = _like(rates, parameter)
    if weight_decay and parameter.ndim > 2:
        parameter.mul_(1 - rate * weight_decay)
    denominator = square.sqrt().mul_(second**-0.5).add_(EPS)
    parameter.sub_((mean / denominator).mul_(rate / first))


def lars(
    parameter: Tensor, gradient: Tensor, moments: list[Tensor], rates: Tensor, step: int, weight_decay: float
) -> None:
    """LARS (You et al. 2017): momentum, and matrices [K, C, F] take steps in proportion to their norms.

    Vectors [K, C] are neither scaled nor decayed, and neither is the step of a matrix that is 0 or has a
    gradient of 0.
    """
    (velocity,) = moments
    if parameter.ndim > 2:
        axes = tuple(range(1, parameter.ndim))
        size, slope = (torch.linalg.vector_norm(x, dim=axes, keepdim=True) for x in (parameter, gradient))
        trust = TRUST * size / (slope + weight_decay * size)
        gradient = torch.where((size > 0) & (slope > 0), trust, 1.0) * (gradient + weight_decay * parameter)
    velocity.mul_(MOMENTUM).add_(gradient)
    parameter.sub_(_like(rates, parameter) * velocity)


STEPS: dict[str, tuple[Step, int]] = {"adamw": (adamw, 2), "lars": (lars, 1)}
"""By name: the step, and its number of moments."""


def _like(rates: Tensor, parameter: Tensor) -> Tensor:
    """[K] → [K, 1, …] with as many dimensions as the parameter."""
    return rates.view(-1, *[1] * (parameter.ndim - 1))
