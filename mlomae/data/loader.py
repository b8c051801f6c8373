"""The streams of the three levels and the sets behind them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from mlomae.config import Config
from mlomae.data.batches import Batch, OrderedBatches, Subset, iterate
from mlomae.data.resident import can_be_resident, is_worthwhile, make_resident
from mlomae.data.sources import Source, open_dataset
from mlomae.data.splits import make_splits
from mlomae.data.stream import Stream
from mlomae.data.transforms import Augment
from mlomae.errors import UserError

Level = Literal["pretrain", "head", "mask"]
Part = Literal["train", "heldout", "test"]

CPU = torch.device("cpu")


class LevelLoaders:
    """The streams of the three levels and the sets they come from.

    ``pretrain`` and ``head`` read the training set, augmented; ``mask`` reads the held-out set as it is.
    ``head`` and ``mask`` are None where the masking policy does not learn. No stream reads the test set.

    Raises:
        UserError: the data is missing, damaged, overlapping, too small, or lacks needed labels.
    """

    def __init__(
        self, config: Config, rank: int = 0, world_size: int = 1, device: torch.device = CPU
    ) -> None:
        data = config.data
        self._config = config
        self._dataset = open_dataset(data, config.model.in_chans)
        self.num_classes = self._dataset.num_classes
        self.mean, self.std = self._dataset.mean, self._dataset.std
        learns = config.masking.learns
        if learns and self._dataset.train.labels is None:
            raise UserError(
                f"data.path: {data.path} has no labels; the head and mask levels need them "
                "(masking.policy=random does not)"
            )
        self._splits = make_splits(self._dataset, data)

        self._device = device
        self._resident: dict[Part, Subset] = {}

        def stream(level: Level, part: Part, kind: Augment) -> Stream:
            subset, batch = self._placed(level, part, kind), getattr(config, level).batch_size
            return Stream(subset, level, batch, config.seed, kind, data.workers, rank, world_size, device)

        self.pretrain = stream("pretrain", "train", data.augment)
        self.head = stream("head", "train", data.augment) if learns else None
        self.mask = stream("mask", "heldout", "none") if learns else None

    @property
    def sizes(self) -> dict[Part, int]:
        """Images per set; "test" is missing where counting would mean opening the test part."""
        sizes: dict[Part, int] = {"train": len(self._splits.train), "heldout": len(self._splits.heldout)}
        if self._splits.test is not None:
            sizes["test"] = len(self._splits.test)
        elif self._dataset.files is not None and not self._dataset.files[1].shards:
            sizes["test"] = len(self._dataset.files[1].names)
        return sizes

    def evaluation(self, part: Part) -> Iterator[Batch]:
        """All images of a set once, in order, not augmented; the last batch may be short.

        Every rank gets all of them: ``number`` counts the batches, ``first_row`` is 0.
        """
        subset = self._subset(part)
        batches = OrderedBatches(subset, self._config.eval.batch_size)
        read = iterate(batches, range(len(batches)), self._config.data.workers)
        return (batch.normalised(subset) for batch in read)

    def sample_images(self, part: Part, count: int) -> Tensor:
        """The first ``count`` images of a set (all if it has fewer): float32 [count, C, H, W], normalised."""
        subset = self._subset(part)
        return OrderedBatches(subset, min(count, len(subset))).read(0).normalised(subset).images

    def close(self) -> None:
        """Ends the loader processes of all streams."""
        for stream in (self.pretrain, self.head, self.mask):
            if stream is not None:
                stream.close()

    def _placed(self, level: Level, part: Part, kind: Augment) -> Subset:
        """The set of a level where its stream reads it: on the device, if ``data.resident`` says so.

        Raises:
            UserError: it cannot be there.
        """
        subset, wanted, config = self._subset(part), self._config.data.resident, self._config
        if wanted == "always" and not can_be_resident(kind):
            raise UserError(
                f"data.resident: always, but data.augment {kind} needs images of their own size; use auto"
            )
        per_iteration = config.pretrain.unroll_steps if level == "pretrain" else 1
        to_read = config.iterations * per_iteration * getattr(config, level).batch_size
        worthwhile = can_be_resident(kind) and is_worthwhile(subset, config.model.in_chans, to_read)
        if wanted == "never" or (wanted == "auto" and part not in self._resident and not worthwhile):
            return subset
        if part not in self._resident:
            self._resident[part] = make_resident(subset, self._device)
        return self._resident[part]

    def _subset(self, part: Part) -> Subset:
        if part == "test":
            return self._test
        return self._make_subset(self._dataset.train, getattr(self._splits, part))

    @cached_property
    def _test(self) -> Subset:
        if self._dataset.open_test is None:
            assert self._splits.test is not None, "split off where there is no test part"
            return self._make_subset(self._dataset.train, self._splits.test)
        source = self._dataset.open_test()
        return self._make_subset(source, torch.arange(len(source)))

    def _make_subset(self, source: Source, indices: Tensor) -> Subset:
        return Subset(source, indices, self._config.model.size, self.mean, self.std)
