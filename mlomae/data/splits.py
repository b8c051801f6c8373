"""The train, held-out and test sets: who belongs where, and the proof that they do not overlap.

Membership is a stable hash of the sample's key and the split seed, so it is the same on every
machine and for every world size, and adding samples moves none of the others.
"""

from __future__ import annotations

import filecmp
import hashlib
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from mlomae.data.dataset import Dataset, PartFiles
from mlomae.errors import UserError
from mlomae.sections import ImagesConfig


@dataclass(frozen=True)
class Splits:
    """Index sets (int64 [n], ascending) into the training part of a data set.

    Samples without a label belong to ``train`` where others have one: only level pretrain needs none.
    """

    train: Tensor
    labelled: Tensor  # the part of ``train`` that has labels
    heldout: Tensor
    test: Tensor | None  # None: the data set has a test part of its own


def make_splits(dataset: Dataset, data: ImagesConfig) -> Splits:
    """Splits the training part and verifies that nothing overlaps.

    Raises:
        UserError: a set has no image (of a partly labelled data set: no labelled one; names the fraction
            to change), or two sets overlap.
    """
    keys, labels = dataset.train.keys, dataset.train.labels
    has_label = torch.zeros(len(keys), dtype=torch.bool) if labels is None else labels >= 0
    # Without any labels all samples are drawn from.
    drawn = has_label if labels is not None else ~has_label
    test = torch.zeros(len(keys), dtype=torch.bool)
    if dataset.open_test is None:
        test = _draw(keys, f"{data.split_seed}/test", data.test_fraction) & drawn
    heldout = _draw(keys, f"{data.split_seed}/heldout", data.heldout_fraction) & drawn & ~test
    train = ~test & ~heldout
    _require_images(data, drawn, train, heldout, test if dataset.open_test is None else None)
    splits = Splits(
        train=train.nonzero().flatten(),
        labelled=(train & has_label).nonzero().flatten(),
        heldout=heldout.nonzero().flatten(),
        test=test.nonzero().flatten() if dataset.open_test is None else None,
    )
    verify_disjoint(splits, keys)
    if dataset.files is not None:
        verify_files(*dataset.files)
    return splits


def _require_images(
    data: ImagesConfig, drawn: Tensor, train: Tensor, heldout: Tensor, test: Tensor | None
) -> None:
    """Raises UserError when a set holds no sample of those ``drawn`` from; all are masks bool [N]."""
    of_what = str(len(drawn)) if drawn.all() else f"{int(drawn.sum())} labelled ones (of {len(drawn)})"
    for field, name, part, change in (
        ("test_fraction", "test", test, "raise"),
        ("heldout_fraction", "held-out", heldout, "raise"),
        ("heldout_fraction", "training", train & drawn, "lower"),
    ):
        if part is not None and not part.any():
            more = "add images" if drawn.all() else "label more images"
            found = f"{getattr(data, field)} leaves no {name} image of {of_what}"
            raise UserError(f"data.{field}: {found}; {change} it or {more}")


def verify_disjoint(splits: Splits, keys: Sequence[str]) -> None:
    """Raises UserError when one sample key occurs in two of the index sets."""
    owner: dict[str, str] = {}
    for name, indices in (("train", splits.train), ("held-out", splits.heldout), ("test", splits.test)):
        for index in indices.tolist() if indices is not None else ():
            first = owner.setdefault(keys[index], name)
            if first != name:
                raise UserError(
                    f"data: sample {keys[index]} is in the {first} and the {name} set; keys must be unique"
                )


def verify_files(train: PartFiles, test: PartFiles) -> None:
    """Raises UserError when a test file is a training file, by link or by content; decodes nothing.

    Contents are compared where sizes are equal and, for images, where the names are too.
    """
    try:
        pair = _find_same(train, test)
    except OSError as error:
        raise UserError(f"data.path: {error.filename} cannot be read ({error.strerror})") from None
    if pair is not None:
        raise UserError(
            f"data.path: test file {pair[1]} is the training file {pair[0]}; keep the parts apart"
        )


def _find_same(train: PartFiles, test: PartFiles) -> tuple[Path, Path] | None:
    digest = cache(_digest)
    owners: dict[tuple[int, int], Path] = {}
    twins: defaultdict[tuple[int, str], list[Path]] = defaultdict(list)
    for path, name, stat in _present(train):
        owners[stat.st_dev, stat.st_ino] = path
        twins[stat.st_size, "" if train.shards else name].append(path)
    for path, name, stat in _present(test):
        if (owner := owners.get((stat.st_dev, stat.st_ino))) is not None:
            return owner, path
        for twin in twins.get((stat.st_size, "" if test.shards else name), ()):
            # Most files differ early.
            if digest(twin) == digest(path) and filecmp.cmp(twin, path, shallow=False):
                return twin, path
    return None


def _present(part: PartFiles) -> Iterator[tuple[Path, str, os.stat_result]]:
    """The files of a part but missing ones, which are reported when they are read."""
    for name in part.names:
        path = part.root / name
        try:
            yield path, name, path.stat()
        except FileNotFoundError:
            continue


def key_digest(stream: str, key: str) -> bytes:
    """Eight bytes that depend on a sample's key and a stream's name only."""
    return hashlib.blake2s(f"{stream}/{key}".encode("utf-8", "surrogateescape"), digest_size=8).digest()


def _draw(keys: Sequence[str], stream: str, fraction: float) -> Tensor:
    """bool [N]: the samples whose hash, read as a number in [0, 1), lies below ``fraction``."""
    limit = int(fraction * 2**64)
    digests = (key_digest(stream, key) for key in keys)
    return torch.tensor([int.from_bytes(digest, "big") < limit for digest in digests], dtype=torch.bool)


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.sha256(file.read(2**20)).digest()
