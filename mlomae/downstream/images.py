"""Images with class labels to train and test an encoder on, opened as it takes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mlomae.config import load_config, refuse_commands
from mlomae.data.dataset import STATISTICS, Source
from mlomae.data.decoding import MODES
from mlomae.data.ledger import FaultLedger
from mlomae.data.shards.source import ShardSource
from mlomae.data.sources import open_account, open_dataset
from mlomae.data.splits import make_splits
from mlomae.data.subset import Subset
from mlomae.errors import UserError
from mlomae.interop.pretrained import Pretrained
from mlomae.interop.runs import CONFIG, run_of
from mlomae.sections import ImagesConfig


def with_data_of_run(values: Any) -> Any:
    """A task's raw configuration, where no data set is named with the data section of the encoder's run.

    Fields of the section that are given are kept.

    Raises:
        UserError: the encoder is no run.
    """
    if not isinstance(values, dict) or not values.get("encoder"):
        return values
    given = values.get("data") or {}
    if not isinstance(given, dict) or "dataset" in given:
        return values
    run = run_of(Path(str(values["encoder"])))
    if run is None:
        raise UserError(
            f"data.dataset: missing, and {values['encoder']} is of no run whose images could be "
            "taken; give data.dataset and data.path"
        )
    known = load_config(run / CONFIG, {}).data
    refuse_commands(run, known, given)
    return {**values, "data": {**known.model_dump(include=set(ImagesConfig.model_fields)), **given}}


class LabelledImages:
    """All labelled training images of a data set, held-out ones included, and its test images.

    Args:
        ledger: receives the bad samples that are known from the start.

    Raises:
        UserError: the data is missing, damaged or lacks labels, or its channels do not suit the encoder.
    """

    def __init__(self, data: ImagesConfig, pretrained: Pretrained, ledger: FaultLedger) -> None:
        self._data, self._pretrained, self._ledger = data, pretrained, ledger
        _verify_channels(data, pretrained)
        self._dataset = open_dataset(data, pretrained.in_chans)
        train = self._dataset.train
        if self._dataset.num_classes is None or train.labels is None:
            raise UserError(f"data.path: {data.path} has no labels; give images with labels")
        self.num_classes = self._dataset.num_classes
        self._splits = make_splits(self._dataset, data)
        open_account(self._ledger, train)

    def train(self, size: tuple[int, int]) -> Subset:
        """The labelled training images and the held-out ones, at a size (height, width).

        Raises:
            UserError: they can only be read front to back.
        """
        source = self._dataset.train
        if isinstance(source, ShardSource) and source.remote:
            raise UserError(
                f"data.path: {self._data.path} is no file, but images are read in random order here; "
                "copy the shards to a disk"
            )
        both = torch.cat([self._splits.labelled, self._splits.heldout])
        return self._subset(self._dataset.train, both.sort().values, size)

    def test(self, size: tuple[int, int]) -> Subset:
        """The test images; opens the test part.

        Raises:
            UserError: they lack labels, or have those of other classes than the training images.
        """
        indices, source = self._splits.test, self._dataset.train
        if indices is None:
            assert self._dataset.open_test is not None, "else a test part is split off"
            source = self._dataset.open_test()
            open_account(self._ledger, source)
            indices = torch.arange(len(source))
        if source.labels is None:
            raise UserError(f"data.path: the test images of {self._data.path} have no labels; add them")
        labels = source.labels[indices]
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong):
            raise UserError(
                f"data.path: label {int(wrong[0])} among the test images of {self._data.path}; training has "
                f"the classes 0 to {self.num_classes - 1}"
            )
        return self._subset(source, indices, size)

    def class_names(self) -> tuple[str, ...]:
        """Of all classes; numbers where they have no names."""
        return self._dataset.class_names or tuple(map(str, range(self.num_classes)))

    def _subset(self, source: Source, indices: torch.Tensor, size: tuple[int, int]) -> Subset:
        return Subset(source, indices, size, self._pretrained.mean, self._pretrained.std)


def _verify_channels(data: ImagesConfig, pretrained: Pretrained) -> None:
    wanted = pretrained.in_chans
    if wanted not in MODES:
        raise UserError(f"encoder: {pretrained.source} takes {wanted} channels; images have 1 or 3")
    if data.dataset in STATISTICS and (channels := len(STATISTICS[data.dataset][0])) != wanted:
        raise UserError(
            f"data.dataset: {data.dataset} has {channels} channel{'s' * (channels > 1)}, but "
            f"{pretrained.source} takes {wanted}; choose other images or another encoder"
        )
