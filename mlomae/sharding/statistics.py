"""What sets of shards hold: samples, classes, formats and sizes, and how they would be split."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

from mlomae.data.dataset import STATISTICS, Dataset
from mlomae.data.decoding import image_size
from mlomae.data.faults import BadSample
from mlomae.data.shards.scan import scan
from mlomae.data.shards.source import ShardSource
from mlomae.data.shards.table import ShardIndex
from mlomae.data.splits import make_splits
from mlomae.errors import UserError
from mlomae.sections import ImagesConfig
from mlomae.sharding.encoding import find_kind
from mlomae.sharding.indexing import read_classes
from mlomae.sharding.report import Problem, find_sets

SAMPLED = 1000  # images whose headers are read for their sizes


@dataclass(frozen=True)
class Spread:
    """Of numbers."""

    least: float
    median: float
    most: float


@dataclass(frozen=True)
class PartStatistics:
    """What one part holds.

    Attributes:
        classes: samples by class, by its name or else its number.
        kinds: samples by image format, of those that were looked into.
        sampled: how many of them had a readable header.
        image_bytes: of all samples.
        width, height: of those that were looked into; None where none could be read.
    """

    part: str
    shards: int
    num_bytes: int
    samples: int
    labelled: int
    classes: Mapping[str, int]
    kinds: Mapping[str, int]
    sampled: int
    image_bytes: Spread | None
    width: Spread | None
    height: Spread | None


@dataclass(frozen=True)
class SplitStatistics:
    """How a run with default settings would split the training part.

    Attributes:
        sizes: samples by set.
        without_heldout: classes of which no sample is held out.
    """

    sizes: Mapping[str, int]
    without_heldout: int


def measure(where: str) -> tuple[list[PartStatistics], SplitStatistics | str | None]:
    """What the shards hold, by part, and how the training part would be split.

    Returns:
        The parts; the split, or why there is none, or None without a training part.

    Raises:
        UserError: there are no shards, or they cannot be read.
    """
    problems: list[Problem] = []
    sets = find_sets(where, problems)
    if problems:
        raise UserError(problems[0].found)
    indexes = {
        one.part: one.index or replace(scan(one.urls), classes=read_classes(one.urls[0])) for one in sets
    }
    parts = [_measure_part(part, index) for part, index in indexes.items()]
    return parts, _measure_split(indexes) if "train" in indexes else None


def _measure_part(part: str, index: ShardIndex) -> PartStatistics:
    samples = index.samples
    labels = samples.labels[samples.labels >= 0]
    counts = labels.bincount(minlength=len(index.classes or ())).tolist() if len(labels) else []
    names: Sequence[str] = index.classes or [str(number) for number in range(len(counts))]
    kinds: Counter[str] = Counter()
    sizes = []
    for content in _look_into(index):
        kinds[find_kind(content) or "other"] += 1
        try:
            sizes.append(image_size(content))
        except BadSample:
            continue
    return PartStatistics(
        part,
        len(index.shards),
        sum(max(shard.num_bytes, 0) for shard in index.shards),
        len(samples),
        len(labels),
        {names[number] if number < len(names) else str(number): n for number, n in enumerate(counts)},
        dict(kinds.most_common()),
        len(sizes),
        _spread(samples.sizes.tolist()),
        _spread([width for _, width in sizes]),
        _spread([height for height, _ in sizes]),
    )


def _look_into(index: ShardIndex) -> Iterator[bytes]:
    """Some of the images, evenly spread; the first ones of remote shards, which are read front to back."""
    source = ShardSource(index)
    sampled = min(len(source), SAMPLED)
    for number in range(sampled):
        try:
            yield source.content(number if source.remote else number * len(source) // sampled)
        except BadSample:
            continue


def _spread(values: Sequence[int]) -> Spread | None:
    return Spread(min(values), median(values), max(values)) if values else None


def _measure_split(indexes: Mapping[str, ShardIndex]) -> SplitStatistics | str:
    """The split by the defaults, or why there is none."""
    source = ShardSource(indexes["train"])
    has_test = "test" in indexes or "val" in indexes
    classes = None if source.labels is None else int(source.labels.max()) + 1
    dataset = Dataset(source, classes, *STATISTICS["RGB"], open_test=(lambda: source) if has_test else None)
    settings: dict[str, Any] = {"dataset": "shards", "path": "."}
    try:
        splits = make_splits(dataset, ImagesConfig(**settings))
    except UserError as error:
        return str(error)
    sizes = {"train": len(splits.train), "heldout": len(splits.heldout)}
    if splits.test is not None:
        sizes["test"] = len(splits.test)
    if source.labels is None:
        return SplitStatistics(sizes, 0)
    present = set(source.labels[source.labels >= 0].tolist())
    return SplitStatistics(sizes, len(present - set(source.labels[splits.heldout].tolist())))
