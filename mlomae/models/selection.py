"""Mask policies: which patches of a batch are removed.

Every policy turns into one sort key per patch; the ``num_keep`` lowest keys are kept. Noise comes
from counters (``mlomae.random``), so a selection can be repeated exactly and does not depend on how
many ranks share the batch. Letters: B batch, L patches, K kept patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import mlomae_kernels
from mlomae.random import counter_uniform, stream_seed

if TYPE_CHECKING:  # networks take any object with these attributes: pydantic is not needed to build one
    from mlomae.sections import MaskingConfig

NUM_BLOCKS = 2


@dataclass(frozen=True)
class PatchSelection:
    """The patches kept in each image of a batch.

    Attributes:
        ids_keep: int64 [B, K].
        ids_restore: int64 [B, L], the inverse of the permutation (kept first, removed after).
        mask: float [B, L], 0 where kept and 1 where removed.
    """

    ids_keep: Tensor
    ids_restore: Tensor
    mask: Tensor

    @property
    def ids_removed(self) -> Tensor:
        """int64 [B, L - K], the removed patches in the order in which they were ranked."""
        return self.ids_restore.argsort(dim=1)[:, self.ids_keep.shape[1] :].contiguous()


class MaskPolicy:
    """Chooses patches by the policy named in ``masking.policy``.

    Args:
        config: section ``masking``.
        grid: (rows, columns) of patches.
        num_keep: K.
        seed: of the run.
        num_steps: batches of the run; read by ``hard``, whose masks become harder on the way.
    """

    def __init__(
        self, config: MaskingConfig, grid: tuple[int, int], num_keep: int, seed: int, num_steps: int = 1
    ) -> None:
        self.config = config
        self.grid = grid
        self.num_keep = num_keep
        self.num_steps = num_steps
        self.noise_seed = stream_seed(seed, "mask", "noise")
        self.share_seed = stream_seed(seed, "mask", "random-share")

    def select(
        self, scores: Tensor | None, batch_size: int, step: int, first_row: int, device: torch.device
    ) -> PatchSelection:
        """The training-time selection of one batch.

        Args:
            scores: [B, L] of the masking network; read by ``learned`` and ``hard``.
            batch_size: B, images on this rank.
            step: counter of the batch; the same step gives the same selection.
            first_row: position of image 0 in the global batch.
        """
        num_patches = self.grid[0] * self.grid[1]
        rows = (batch_size, num_patches)
        policy = self.config.policy
        if policy == "fixed":
            row = counter_uniform(self.noise_seed, 0, 0, (1, num_patches), device)
            return self.keep_lowest(row.expand(rows))
        noise = counter_uniform(self.noise_seed, step, first_row, rows, device)
        if policy == "learned":
            assert scores is not None
            keys = self._learned_keys(scores, noise, step, first_row)
        elif policy == "hard":
            assert scores is not None
            keys = self._hard_keys(scores, noise, step)
        elif policy == "block":
            keys = block_keys(noise, self.grid)
        else:
            keys = noise
        return self.keep_lowest(keys)

    def keep_lowest(self, keys: Tensor) -> PatchSelection:
        """The deterministic selection: the ``num_keep`` lowest keys of each row are kept."""
        return PatchSelection(*mlomae_kernels.select_patches(keys, self.num_keep))

    def _learned_keys(self, scores: Tensor, noise: Tensor, step: int, first_row: int) -> Tensor:
        keys = scores.detach().to(torch.float32)
        if self.config.selection == "gumbel":
            # Gumbel-perturbed top-k: removing the highest keys samples patches without replacement,
            # with probabilities proportional to exp(score / temperature) (Kool et al. 2019).
            keys = keys - self.config.temperature * torch.log(-torch.log(noise))
        if self.config.random_share:
            draw = counter_uniform(self.share_seed, step, first_row, (len(keys), 1), keys.device)
            keys = torch.where(draw < self.config.random_share, noise, keys)
        return keys

    def _hard_keys(self, scores: Tensor, noise: Tensor, step: int) -> Tensor:
        """Noise, above which the patches lie that are removed because they are hard.

        Of the removed patches a share that grows linearly with the steps are those with the highest scores:
        a new network cannot rank patches, and what is hard alone is no sample of the image (HPM: Wang et al.,
        CVPR 2023, section 3.3).
        """
        patches = noise.shape[1]
        progress = min(1.0, step / max(1, self.num_steps - 1))
        num_hard = round(self.config.hard_share * progress * (patches - self.num_keep))
        ranked = scores.detach().to(torch.float32)
        *_, hard = mlomae_kernels.select_patches(ranked, patches - num_hard)
        return noise + hard


def block_keys(noise: Tensor, grid: tuple[int, int]) -> Tensor:
    """Keys that remove contiguous blocks: the patches nearest to ``NUM_BLOCKS`` random centres.

    A block is connected through sides or corners; blocks that meet merge.

    Args:
        noise: [B, L] uniform numbers; the first few of a row place its blocks.
        grid: (rows, columns), L = rows * columns.

    Returns:
        [B, L]; minus the Chebyshev distance to the nearest centre, ties broken by the noise.
    """
    rows, columns = grid
    num_blocks = min(NUM_BLOCKS, noise.shape[1] // 2)
    centre_row = (noise[:, :num_blocks, None, None] * rows).floor()
    centre_column = (noise[:, num_blocks : 2 * num_blocks, None, None] * columns).floor()
    down = torch.arange(rows, device=noise.device)[None, None, :, None]
    across = torch.arange(columns, device=noise.device)[None, None, None, :]
    distance = torch.maximum((down - centre_row).abs(), (across - centre_column).abs())
    nearest = distance.amin(dim=1).flatten(1)
    return 0.5 * noise - nearest
