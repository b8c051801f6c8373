"""The streams of the three levels and the sets behind them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from mlomae.config import Config
from mlomae.data.batches import Batch, OrderedBatches, PixelBatch, iterate
from mlomae.data.dataset import Source
from mlomae.data.ledger import FaultLedger
from mlomae.data.resident import can_be_resident, is_worthwhile, make_resident
from mlomae.data.scenes import SceneSource
from mlomae.data.shards.source import ShardSource
from mlomae.data.sources import open_account, open_dataset
from mlomae.data.splits import make_splits
from mlomae.data.stream import Stream
from mlomae.data.subset import Subset
from mlomae.data.transforms import Augment
from mlomae.errors import UserError

Level = Literal["pretrain", "head", "mask"]
Part = Literal["train", "labelled", "heldout", "test"]

CPU = torch.device("cpu")


class LevelLoaders:
    """The streams of the three levels and the sets they come from.

    ``pretrain`` reads the training set and ``head`` its labelled images, augmented; ``mask`` reads the
    held-out set as it is. ``head`` and ``mask`` are None without a hypergradient. No stream
    reads the test set. The bad samples that they meet are in ``ledger``.

    Raises:
        UserError: the data is missing, damaged, overlapping, too small, or lacks needed labels.
    """

    def __init__(
        self, config: Config, rank: int = 0, world_size: int = 1, device: torch.device = CPU
    ) -> None:
        data = config.data
        self._config = config
        self._dataset = open_dataset(data, config.model.in_chans)
        self.num_classes, self.class_names = self._dataset.num_classes, self._dataset.class_names
        self.mean, self.std = self._dataset.mean, self._dataset.std
        # With label maps every image is labelled.
        self.has_label_maps = isinstance(self._dataset.train, SceneSource)
        self.ledger = FaultLedger(data.max_bad_share)
        open_account(self.ledger, self._dataset.train)
        learns = config.masking.learns
        if learns and self._dataset.train.labels is None and not self.has_label_maps:
            raise UserError(
                f"data.path: {data.path} has no labels; the head and mask levels need them "
                "(masking.policy=random does not)"
            )
        self._splits = make_splits(self._dataset, data)
        if self.has_label_maps:
            self._splits = replace(self._splits, labelled=self._splits.train)
        if config.pretrain.label_weight:
            self._require_classes()

        self._device = device
        self._resident: dict[Part, Subset] = {}

        def stream(level: Level, part: Part, kind: Augment) -> Stream:
            subset, batch = self._placed(level, part, kind), getattr(config, level).batch_size
            share = rank, world_size, device
            return Stream(
                subset,
                level,
                batch,
                config.seed,
                kind,
                data.workers,
                *share,
                self.ledger,
                self._buffer(subset),
            )

        labelled: Part = "train" if len(self._splits.labelled) == len(self._splits.train) else "labelled"
        self.pretrain = stream("pretrain", "train", data.augment)
        self.head = stream("head", labelled, data.augment) if learns else None
        self.mask = stream("mask", "heldout", "none") if learns else None

    @property
    def sizes(self) -> dict[Part, int]:
        """Images per set; "test" is missing where counting would mean opening the test part.

        "labelled" tells how many training images have a label, where not all of them have one.
        """
        splits = self._splits
        sizes: dict[Part, int] = {"train": len(splits.train), "heldout": len(splits.heldout)}
        if len(splits.labelled) < len(splits.train):
            sizes["labelled"] = len(splits.labelled)
        if splits.test is not None:
            sizes["test"] = len(splits.test)
        elif self._dataset.files is not None and not self._dataset.files[1].shards:
            sizes["test"] = len(self._dataset.files[1].names)
        return sizes

    def describe(self) -> str:
        """What is read, and how, in one line."""
        sizes = self.sizes
        labelled = f" ({sizes['labelled']:,} labelled)" if sizes.get("labelled") else ""
        bad = f", {len(self.ledger):,} bad samples" if len(self.ledger) else ""
        how = "resident" if "train" in self._resident else self.pretrain.access
        return (
            f"data: {sizes['train']:,} train{labelled} and {sizes['heldout']:,} held-out images{bad}; {how}"
        )

    def evaluation(self, part: Part) -> Iterator[Batch]:
        """All images of a set once, in order, not augmented; batches may be short or missing for bad samples.

        Every rank gets all of them: ``number`` counts the batches, ``first_row`` is 0.
        """
        subset = self._subset(part)
        batches = OrderedBatches(subset, self._config.eval.batch_size)
        # Every process more would read remote shards from their beginnings once more.
        workers = min(self._config.data.workers, 1) if _is_remote(subset) else self._config.data.workers
        return self._usable(subset, iterate(batches, range(len(batches)), workers))

    def count(self, part: Part) -> int:
        """Images of a set, bad ones included; opens the test part."""
        return len(self._subset(part))

    def sample(self, part: Part, count: int) -> Batch:
        """The first ``count`` images of a set, or all that it has; for a bad one stands a good one."""
        subset = self._subset(part)
        rows = torch.arange(min(count, len(subset)))
        loaded = subset.read(rows, "none", torch.zeros(len(rows), 0))
        self.ledger.note(loaded.faults)
        _close(subset)
        return PixelBatch.of(loaded, 0, 0).normalised(subset)

    @property
    def numbers_per_image(self) -> int:
        """Channels times pixels."""
        height, width = self._config.model.size
        return self._config.model.in_chans * height * width

    def close(self) -> None:
        """Ends the loader processes of all streams."""
        for stream in (self.pretrain, self.head, self.mask):
            if stream is not None:
                stream.close()
        _close(self._subset("train"))

    def _usable(self, subset: Subset, batches: Iterator[PixelBatch]) -> Iterator[Batch]:
        """Batches with good samples; all ranks see the same ones, and the limit is checked afterwards."""
        for batch in batches:
            self.ledger.note(batch.faults)
            if len(batch.indices):
                yield batch.normalised(subset)
        _close(subset)

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
        bytes_per_pixel = config.model.in_chans + self.has_label_maps
        worthwhile = can_be_resident(kind) and is_worthwhile(subset, bytes_per_pixel, to_read)
        if wanted == "never" or (wanted == "auto" and part not in self._resident and not worthwhile):
            return subset
        if part not in self._resident:
            self._resident[part], faults = make_resident(subset, self._device)
            self.ledger.add(faults)  # the same on every rank
            _close(subset)
        return self._resident[part]

    def _require_classes(self) -> None:
        """For ``pretrain.label_weight``, whose loss is a mean over all training images.

        Raises:
            UserError: there are label maps, or labels are missing.
        """
        train, labelled = len(self._splits.train), len(self._splits.labelled)
        found = f"{train - labelled:,} of {train:,} without one"
        if self.has_label_maps:
            found = "label maps"
        elif self._dataset.train.labels is None:
            found = "no labels"
        elif labelled == train:
            return
        raise UserError(
            f"pretrain.label_weight: needs a class for every training image, found {found}; set it to 0"
        )

    def _buffer(self, subset: Subset) -> int | None:
        """Images that a stream shuffles in memory; None where it reads in random order.

        Raises:
            UserError: random order is asked for and cannot be had.
        """
        data = self._config.data
        if not isinstance(subset.source, ShardSource):
            return None
        if data.access == "random" and subset.source.remote:
            raise UserError(f"data.access: random, but {data.path} is no file; use auto")
        sequential = data.access == "sequential" or subset.source.remote
        return data.shuffle_buffer if sequential else None

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
        open_account(self.ledger, source)
        return self._make_subset(source, torch.arange(len(source)))

    def _make_subset(self, source: Source, indices: Tensor) -> Subset:
        return Subset(source, indices, self._config.model.size, self.mean, self.std)


def _is_remote(subset: Subset) -> bool:
    return isinstance(subset.source, ShardSource) and subset.source.remote


def _close(subset: Subset) -> None:
    """Leaves no connection open that nobody reads from."""
    if isinstance(subset.source, ShardSource):
        subset.source.close()
