"""What the mask looks like: entropy, saturation, agreement between images, frequency by position."""

from __future__ import annotations

import torch
from torch import Tensor

# A score counts as saturated when its probability moves by less than this share of the slope it has
# at score 0, where the slope is largest.
SATURATED_SLOPE = 0.05


def mask_statistics(mask: Tensor, scores: Tensor | None, bound: float) -> tuple[dict[str, Tensor], Tensor]:
    """Health of the masks of one batch.

    Args:
        mask: [B, L], 1 where removed.
        scores: [B, L] of the masking network, or None.
        bound: ``masking.logit_bound``.

    Returns:
        Scalars by name and the removal frequency by position [L]:

        * ``mask/agreement``: share of positions on which two different images of the batch agree;
          1 means one mask for all images, and ``r² + (1-r)²`` is chance at ratio r.
        * ``mask/entropy``: mean binary entropy of the probabilities in bits; 1 at p = 0.5, 0 at p = 0 or 1.
        * ``mask/saturation``: share of scores whose probability hardly moves any more, because of the
          sigmoid or of the bound.
        * ``mask/spread``: standard deviation of the scores within an image.
    """
    frequency = mask.mean(dim=0)
    scalars: dict[str, Tensor] = {}
    images = len(mask)
    if images > 1:
        removed = mask.sum(dim=0)
        kept = images - removed
        pairs = removed * (removed - 1) + kept * (kept - 1)
        scalars["mask/agreement"] = (pairs / (images * (images - 1))).mean()
    if scores is not None:
        p = scores.sigmoid()
        entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)) / torch.log(p.new_tensor(2.0))
        slope = 4 * p * (1 - p) * (1 - (scores / bound) ** 2)
        scalars["mask/entropy"] = entropy.mean()
        scalars["mask/saturation"] = (slope < SATURATED_SLOPE).to(p.dtype).mean()
        scalars["mask/spread"] = scores.std(dim=1).mean()
    return scalars, frequency
