"""What a mask does to a few images: probability, the masked image and what the autoencoder fills in."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

import mlomae_kernels
from mlomae.levels import mask_scores
from mlomae.models.mae import MaskedAutoencoder
from mlomae.models.selection import MaskPolicy, PatchSelection

# Draws that estimate the removal probability of a policy without a masking network.
NUM_DRAWS = 64


@dataclass(frozen=True)
class Preview:
    """N images of L patches, all on the CPU.

    Attributes:
        images: float32 [N, C, H, W] in [0, 1].
        probability: float32 [N, L], of removing each patch.
        mask: float32 [N, L], 0 where kept and 1 where removed.
        reconstruction: float32 [N, C, H, W] in [0, 1]; the kept patches are predicted too.
        grid: (rows, columns) of patches.
    """

    images: Tensor
    probability: Tensor
    mask: Tensor
    reconstruction: Tensor
    grid: tuple[int, int]


@torch.no_grad()
def preview(
    autoencoder: MaskedAutoencoder,
    network: nn.Module | None,
    policy: MaskPolicy,
    images: Tensor,
    mean: Tensor,
    std: Tensor,
) -> Preview:
    """Masks and reconstructs ``images`` [N, C, H, W], normalised by mean and std [C, 1, 1]."""
    _, scores = mask_scores(autoencoder, network, images)
    probability, selection = _mask(policy, scores, len(images), images.device)
    prediction = autoencoder.reconstruct(images, selection).to(images.dtype)
    patches = mlomae_kernels.patchify(images, autoencoder.patch_size)
    if autoencoder.norm_pix:
        # The prediction is relative to each patch's own mean and spread, which are shown as given.
        variance, centre = torch.var_mean(patches, dim=2, keepdim=True)
        prediction = prediction * (variance + 1e-6).sqrt() + centre
    reconstruction = mlomae_kernels.unpatchify(prediction, policy.grid, autoencoder.patch_size)
    return Preview(
        as_pixels(images, mean, std),
        probability.float().cpu(),
        selection.mask.float().cpu(),
        as_pixels(reconstruction, mean, std),
        policy.grid,
    )


def as_pixels(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Normalised images [N, C, H, W] as float32 values in [0, 1] on the CPU."""
    return (images * std + mean).clamp(0, 1).float().cpu()


def _mask(
    policy: MaskPolicy, scores: Tensor | None, count: int, device: torch.device
) -> tuple[Tensor, PatchSelection]:
    """Mask probabilities [N, L] and the selection to show: without noise where scores decide."""
    if scores is not None and policy.config.selects_by_score:
        return scores.sigmoid(), policy.keep_lowest(scores)
    shown = policy.select(scores, count, step=0, first_row=0, device=device)
    if scores is not None:
        return scores.sigmoid(), shown
    draws = [policy.select(None, count, step, 0, device).mask for step in range(NUM_DRAWS)]
    return torch.stack(draws).mean(dim=0), shown
