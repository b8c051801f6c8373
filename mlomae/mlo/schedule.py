"""Learning rates as a function of the outer iteration; nothing to store, nothing to resume."""

from __future__ import annotations

import math


def warmup_cosine(iteration: int, iterations: int, lr: float, min_lr: float, warmup: float) -> float:
    """Linear warm-up over a share of the run, then a cosine that reaches ``min_lr`` at the last iteration.

    A run with no more than one iteration after its warm-up ends at ``lr``.

    Args:
        iteration: 0 … iterations - 1.
        iterations: length of the run.
        lr: highest rate.
        min_lr: final rate.
        warmup: share of the run, 0 … 1.
    """
    rising = round(warmup * iterations)
    if iteration < rising:
        return lr * (iteration + 1) / rising
    progress = (iteration - rising) / max(1, iterations - 1 - rising)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
