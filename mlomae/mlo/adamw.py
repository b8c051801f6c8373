"""An AdamW step taken apart: its derivative in the gradient, and the weights before it.

A pretrain step moves theta by -lr * u(g), not by -lr * g. Its hypergradient is therefore
-lr * d(grad_theta L) / d phi * (du/dg) v; du/dg is diagonal (SAMA, Choe et al. 2023, eq. 5).
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def adamw_slope(
    gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, step: int, betas: tuple[float, float], eps: float
) -> Tensor:
    """du/dg, element by element, of ``theta -= lr * u(g)`` with bias-corrected moments.

    Args:
        gradient: g that the step used, after clipping (whose factor counts as constant).
        exp_avg, exp_avg_sq: moments after the step.
        step: number of steps taken, this one included.
        betas, eps: of the optimizer. Weight decay does not depend on g.
    """
    first, second = 1 - betas[0] ** step, 1 - betas[1] ** step
    root = (exp_avg_sq / second).sqrt()
    denominator = root + eps
    # d root / d g, 0 where no gradient ever arrived.
    root_slope = torch.where(root > 0, (1 - betas[1]) / second * gradient / root, 0.0)
    return ((1 - betas[0]) - exp_avg * root_slope / denominator) / denominator / first


@torch.no_grad()
def before_adamw(
    weight: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    betas: tuple[float, float],
    eps: float,
    lr: float,
    weight_decay: float,
) -> Tensor:
    """The weight before the last step, to rounding: what a copy would have cost memory for.

    Args:
        weight: after the step.
        exp_avg, exp_avg_sq, step, betas, eps: see ``adamw_slope``.
        lr, weight_decay: of the step.
    """
    first, second = 1 - betas[0] ** step, 1 - betas[1] ** step
    denominator = exp_avg_sq.sqrt().mul_(second**-0.5).add_(eps)
    return torch.addcdiv(weight, exp_avg, denominator, value=lr / first).div_(1 - lr * weight_decay)
