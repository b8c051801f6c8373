"""What the mask looks like: entropy, saturation, agreement between images, frequency by position."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# A score counts as saturated when its probability moves by less than this share of the slope it has
# at score 0, where the slope is largest.
SATURATED_SLOPE = 0.05


def mask_agreement(frequency: Tensor, num_images: int) -> Tensor:
    """Share of positions on which two different images of a batch agree about removal.

    1 means one mask for all images; ``r² + (1-r)²`` is chance at mask ratio r.

    Args:
        frequency: [L], share of the images in which each position is removed.
        num_images: images behind ``frequency``; a single one agrees with nobody (0).
    """
    removed = frequency * num_images
    kept = num_images - removed
    pairs = removed * (removed - 1) + kept * (kept - 1)
    return (pairs / max(1, num_images * (num_images - 1))).mean()


def score_statistics(scores: Tensor, bound: float) -> dict[str, Tensor]:
    """Health of the scores [B, L] of a masking network bounded by ``masking.logit_bound``.

    Returns:
        * ``mask/entropy``: mean binary entropy of the probabilities in bits; 1 at p = 0.5, 0 at p = 0 or 1.
        * ``mask/saturation``: share of scores whose probability hardly moves any more (sigmoid or bound).
        * ``mask/spread``: standard deviation of the scores within an image.
    """
    p = scores.sigmoid()
    entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)) / math.log(2)
    slope = 4 * p * (1 - p) * (1 - (scores / bound) ** 2)
    return {
        "mask/entropy": entropy.mean(),
        "mask/saturation": (slope < SATURATED_SLOPE).to(p.dtype).mean(),
        "mask/spread": scores.std(dim=1).mean(),
    }
