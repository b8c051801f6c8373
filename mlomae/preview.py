"""The picture of a run: input, mask probability, masked image and reconstruction of a few images."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import mlomae_kernels
from mlomae.levels import mask_scores
from mlomae.models.mae import MaskedAutoencoder
from mlomae.models.selection import MaskPolicy, PatchSelection
from mlomae.visualize import mask_picture

# Draws that estimate the removal probability of a policy without a masking network.
NUM_DRAWS = 64


@torch.no_grad()
def draw_preview(
    path: Path,
    autoencoder: MaskedAutoencoder,
    network: nn.Module | None,
    policy: MaskPolicy,
    images: Tensor,
    mean: Tensor,
    std: Tensor,
    title: str,
) -> None:
    """Writes the picture of ``images`` [N, C, H, W] (normalised by mean and std [C, 1, 1]) to ``path``."""
    _, scores = mask_scores(autoencoder, network, images)
    probability, selection = _mask(policy, scores, len(images), images.device)
    prediction = autoencoder.reconstruct(images, selection).to(images.dtype)
    patches = mlomae_kernels.patchify(images, autoencoder.patch_size)
    if autoencoder.norm_pix:
        # The prediction is relative to each patch's own mean and spread, which are shown as given.
        variance, centre = torch.var_mean(patches, dim=2, keepdim=True)
        prediction = prediction * (variance + 1e-6).sqrt() + centre
    reconstruction = mlomae_kernels.unpatchify(prediction, policy.grid, autoencoder.patch_size)

    def show(x: Tensor) -> Tensor:
        return (x * std + mean).clamp(0, 1).float().cpu()

    mask_picture(
        path,
        show(images),
        probability.float().cpu(),
        selection.mask.float().cpu(),
        show(reconstruction),
        policy.grid,
        title,
    )


def _mask(
    policy: MaskPolicy, scores: Tensor | None, count: int, device: torch.device
) -> tuple[Tensor, PatchSelection]:
    """Mask probabilities [N, L] and the selection to show: without noise where the mask is learned."""
    if scores is not None and policy.config.policy == "learned":
        return scores.sigmoid(), policy.keep_lowest(scores)
    shown = policy.select(scores, count, step=0, first_row=0, device=device)
    if scores is not None:
        return scores.sigmoid(), shown
    draws = [policy.select(None, count, step, 0, device).mask for step in range(NUM_DRAWS)]
    return torch.stack(draws).mean(dim=0), shown
