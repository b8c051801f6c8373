"""The pictures of a run: the latest one, and what its report is made of.

* ``mask.png``: input, removal probability, masked image and reconstruction of some held-out images
* ``pictures.jsonl``: a line per picture with probability and mask of the same images
* ``pictures.safetensors``: all that the latest picture shows, the mask's frequencies, and the influence
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mlomae.data.loader import LevelLoaders
from mlomae.hypergradient import NUM_SHOWN, InfluenceSample
from mlomae.levels import mask_scores
from mlomae.metrics import drop_lines_after
from mlomae.models.mae import MaskedAutoencoder
from mlomae.models.selection import MaskPolicy
from mlomae.preview import Preview, as_pixels, preview
from mlomae.run_dir import RunDir
from mlomae.tensor_file import write_tensors

# Images from which frequencies are taken: at most so many, with at most so many numbers.
MAX_SAMPLE, MAX_SAMPLE_NUMBERS = 256, 2**24


class Pictures:
    """Draws and records, on one rank.

    What an earlier process recorded from ``step`` on is dropped: those steps run again.

    Args:
        step: of the first picture.
        policy: of the masks.
        loaders: give the held-out images, with labels where there are any.
    """

    def __init__(
        self, run_dir: RunDir, step: int, policy: MaskPolicy, loaders: LevelLoaders, device: torch.device
    ) -> None:
        self._run_dir, self._policy = run_dir, policy
        self._mean, self._std = (
            torch.tensor(channels, device=device)[:, None, None] for channels in (loaders.mean, loaders.std)
        )
        count = max(NUM_SHOWN, min(MAX_SAMPLE, MAX_SAMPLE_NUMBERS // loaders.numbers_per_image))
        sample = loaders.sample("heldout", count)
        self._images = sample.images.to(device)
        # Label maps have no class of the whole image.
        labelled = sample.labels is not None and sample.labels.ndim == 1
        self._labels = sample.labels.to(device) if labelled and sample.labels is not None else None
        self._num_classes, self._class_names = loaders.num_classes or 0, loaders.class_names
        drop_lines_after(run_dir.pictures, step - 1)

    def take(
        self,
        step: int,
        autoencoder: MaskedAutoencoder,
        network: nn.Module | None,
        influence: InfluenceSample | None,
    ) -> None:
        """Replaces the latest picture, and adds a line to the history."""
        # Imported late: matplotlib is slow to load and only this rank needs it.
        from mlomae.visualize import mask_picture

        shown = self._images[:NUM_SHOWN]
        latest = preview(autoencoder, network, self._policy, shown, self._mean, self._std)
        title = f"{self._policy.config.policy} mask, iteration {step}"
        frequencies = self._frequencies(autoencoder, network)
        mask_picture(self._run_dir.picture, latest, title, frequencies["frequency"])
        with open(self._run_dir.pictures, "a") as history:
            history.write(json.dumps(_line(step, latest)) + "\n")
        tensors = {**_latest_tensors(latest), **frequencies}
        if influence is not None:
            tensors |= {
                "influence": influence.influence.float().cpu(),
                "influence_removed": influence.mask.to(torch.uint8).cpu(),
                "influence_images": _bytes(as_pixels(influence.images, self._mean, self._std)),
            }
        taken = None if influence is None else influence.iteration + 1
        state = {
            "step": step,
            "grid": list(latest.grid),
            "influence_step": taken,
            "class_names": self._class_names,
        }
        write_tensors(self._run_dir.latest_picture, tensors, state)

    @torch.no_grad()
    def _frequencies(self, autoencoder: MaskedAutoencoder, network: nn.Module | None) -> dict[str, Tensor]:
        """How often each position is removed, over the sample and by class."""
        removed = torch.cat([*self._removed(autoencoder, network)])
        found = {"frequency": removed.mean(dim=0).cpu()}
        if self._labels is None:
            return found
        sums = removed.new_zeros(self._num_classes, removed.shape[1]).index_add_(0, self._labels, removed)
        count = self._labels.bincount(minlength=self._num_classes)
        by_class = (sums / count.clamp(min=1)[:, None]).cpu()
        return {**found, "class_frequency": by_class, "class_count": count.cpu()}

    def _removed(self, autoencoder: MaskedAutoencoder, network: nn.Module | None) -> Iterator[Tensor]:
        """Masks [B, L] of the sample: without noise where scores decide."""
        for number, images in enumerate(self._images.split(NUM_SHOWN)):
            _, scores = mask_scores(autoencoder, network, images)
            if scores is not None and self._policy.config.selects_by_score:
                yield self._policy.keep_lowest(scores).mask.float()
            else:
                first = number * NUM_SHOWN
                yield self._policy.select(scores, len(images), 0, first, images.device).mask.float()


def _line(step: int, latest: Preview) -> dict[str, Any]:
    return {
        "step": step,
        "grid": list(latest.grid),
        "images": len(latest.images),
        "probability": _base64(_bytes(latest.probability).numpy()),
        "removed": _base64(np.packbits(latest.mask.to(torch.uint8).numpy())),
    }


def _latest_tensors(latest: Preview) -> dict[str, Tensor]:
    return {
        "images": _bytes(latest.images),
        "reconstruction": _bytes(latest.reconstruction),
        "probability": latest.probability.to(torch.float16),
        "removed": latest.mask.to(torch.uint8),
    }


def _bytes(values: Tensor) -> Tensor:
    """Values in [0, 1] as uint8."""
    return (values * 255).round().to(torch.uint8)


def _base64(values: np.ndarray) -> str:
    return base64.b64encode(values.tobytes()).decode()
