"""Scenes by number, for training and for testing: batch n is a pure function of n."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mlomae.data.batches import Batches, Order, PixelBatch, permutation
from mlomae.data.faults import BadSample, Fault
from mlomae.data.scenes import SceneSource
from mlomae.data.subset import first_good, substitutes
from mlomae.downstream.joint_transforms import AugmentConfig, augment_scene, resize_image, scaled
from mlomae.random import stream_seed

CPU = torch.device("cpu")


@dataclass(frozen=True)
class TrainScenes(Batches):
    """Augmented crops in a new order each epoch; an epoch's incomplete last batch is dropped.

    A batch's ``labels`` are maps, uint8 [B, h, w]. In place of a bad sample stands a good one, which depends
    on its row only.

    Attributes:
        size: (h, w) of the crops.
        mean: per channel, of values in [0, 1].
    """

    source: SceneSource
    size: tuple[int, int]
    mean: tuple[float, ...]
    augment: AugmentConfig
    order: Order

    def read(self, number: int) -> PixelBatch:
        order, total = self.order, len(self.source)
        epoch, position = divmod(number, total // order.batch)
        start = position * order.batch + order.first_row
        chosen = permutation(total, stream_seed(*order.seed, epoch), CPU)[start : start + order.local]
        faults: list[Fault] = []
        scenes = [
            self._scene(index, stream_seed(order.augment_seed, number, order.first_row + row), faults)
            for row, index in enumerate(chosen.tolist())
        ]
        images, maps = (torch.stack(parts) for parts in zip(*scenes, strict=True))
        return PixelBatch(images, chosen, maps, number, order.first_row, tuple(faults))

    def _scene(self, index: int, seed: int, faults: list[Fault]) -> tuple[Tensor, Tensor]:
        """A crop of the first good sample from ``index`` on; ``faults`` receives the bad ones before it."""
        source, in_chans = self.source, len(self.mean)
        _, scene = first_good(
            substitutes(index, len(source)), source.keys, lambda index: source.scene(index, in_chans), faults
        )
        return augment_scene(*scene, self.size, self.mean, self.augment, seed)


@dataclass(frozen=True)
class TestScenes(Batches):
    """One image a batch, resized so that it just covers ``size``; its map [1, H, W] has the original size.

    A batch of a bad sample is empty.
    """

    __test__ = False  # pytest takes it for tests, by its name

    source: SceneSource
    size: tuple[int, int]
    in_chans: int

    def read(self, number: int) -> PixelBatch:
        try:
            image, labels = self.source.scene(number, self.in_chans)
        except BadSample as bad:
            fault = Fault(self.source.keys[number], bad.kind, bad.reason)
            nothing = torch.empty(0, self.in_chans, *self.size, dtype=torch.uint8)
            return PixelBatch(nothing, torch.empty(0, dtype=torch.int64), None, number, 0, (fault,))
        resized = resize_image(image, scaled(labels.shape, self.size, 1.0))
        return PixelBatch(resized[None], torch.tensor([number]), labels[None], number, 0, ())
