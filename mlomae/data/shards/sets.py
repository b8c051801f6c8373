"""Opens sets of shards: a folder, a pattern of shards, or an index."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from mlomae.data.dataset import STATISTICS, Dataset, PartFiles, Source
from mlomae.data.decoding import MODES
from mlomae.data.shards.index import read_index, read_info
from mlomae.data.shards.scan import scan
from mlomae.data.shards.source import ShardSource
from mlomae.data.shards.table import PackedStrings, SampleTable, ShardIndex
from mlomae.data.urls import expand, fetch, is_remote, local_path, shard_name, sibling
from mlomae.errors import UserError
from mlomae.sections import ImagesConfig

Place = str | Sequence[str]
"""A pattern or the address of an index, or the urls of shards."""
INFO_NAMES = ("_info.json", "info.json")  # timm's


def open_shards(data: ImagesConfig, in_chans: int) -> Dataset:
    """The set that ``data.path`` names.

    A local folder holds train-*.tar, and test-*.tar or val-*.tar if it has a test part. Otherwise ``path``,
    and ``test_path`` for a test part, are patterns of shards or the addresses of their indexes.

    Raises:
        UserError: there are no shards, or they are damaged or do not match their index.
    """
    where, test_where = _locate(data)
    index = open_index(where)
    train = ShardSource(index)
    if not len(train):
        raise UserError(f"data.path: no samples in {data.path}; expected images")
    class_names = None if train.labels is None else _class_names(index, train.labels)
    num_classes = None if train.labels is None else len(class_names or range(int(train.labels.max()) + 1))
    statistics = STATISTICS[MODES[in_chans]]
    if test_where is None:
        return Dataset(train, num_classes, *statistics, class_names=class_names)

    def open_test() -> Source:
        test = ShardSource(open_index(test_where))
        _verify_apart(index, test.index)
        if not len(test):
            raise UserError(f"data.test_path: no samples in {_first(test_where)}; expected images")
        if None not in (index.classes, test.index.classes) and index.classes != test.index.classes:
            raise UserError(
                f"data.test_path: {_first(test_where)} numbers its classes in another way than the training "
                "shards; make both parts with one `mlomae shards create`, or write indexes with --classes"
            )
        if num_classes is not None:
            unlabelled = (test.index.samples.labels < 0).nonzero().flatten().tolist()
            if unlabelled:
                raise UserError(
                    f"{test.keys[unlabelled[0]]}: has no label, but test samples need one where training has "
                    f"them; add it, and those of {len(unlabelled) - 1} others"
                )
            assert test.labels is not None
            _require_known(_first(test_where), test.labels, num_classes)
        return test

    parts = _files(where), _files(test_where)
    files = None if parts[0] is None or parts[1] is None else (parts[0], parts[1])
    return Dataset(train, num_classes, *statistics, open_test=open_test, files=files, class_names=class_names)


def _locate(data: ImagesConfig) -> tuple[Place, Place | None]:
    """Where the training part lies, and the test part."""
    path = data.path
    assert path is not None, "ImagesConfig requires it"
    if is_remote(path):
        return path, data.test_path
    root = local_path(path)
    if root.is_dir():
        train = _in_folder(root, "train")
        if not train:
            raise UserError(f"data.path: no train-*.tar in {root}; give the folder that holds the shards")
        return train, data.test_path or _in_folder(root, "test") or _in_folder(root, "val") or None
    if not root.exists() and not re.search(r"[*?\[{]|::", path):
        raise UserError(f"data.path: {path} is not a folder; give the folder that holds the shards")
    return path, data.test_path


def open_index(where: Place) -> ShardIndex:
    """The index of shards, which a pattern or their urls name, or at the address of an index itself.

    The index beside the shards is taken, as ``mlomae shards create`` and ``index`` write it. Without one, the
    headers of shards that are files are read.

    Raises:
        UserError: there is no index of remote shards, or shards do not match theirs.
    """
    if _is_index(where):
        index = read_index(where)
        _verify_sizes(index)
        return index
    urls = expand(where) if isinstance(where, str) else where
    address = sibling(urls[0], f"{part_name(urls[0])}-index.json")
    if is_remote(urls[0]):
        try:
            index = _select(read_index(address), urls)
        except UserError as error:
            raise UserError(
                f"{error}; shards that are no files need an index: `mlomae shards index '{where}' OUT` "
                f"writes OUT/{part_name(urls[0])}-index.json, which data.path may name"
            ) from None
    elif local_path(address).exists():
        index = _select(read_index(address), urls)
    else:
        index = scan(urls)
        _verify_counts(index, _info_beside(urls[0]))
    _verify_sizes(index)
    return index


def part_name(url: str) -> str:
    """What the names of a part's shards begin with: ``train`` of ``train-000012.tar``."""
    return shard_name(url).partition(".")[0].rstrip("0123456789").rstrip("-_")


def _is_index(where: Place) -> TypeGuard[str]:
    return isinstance(where, str) and shard_name(where).endswith(".json")


def _in_folder(root: Path, part: str) -> list[str]:
    """The part's shards in a folder."""
    return sorted(str(path) for path in root.glob(f"{part}-*.tar"))


def _first(where: Place) -> str:
    return where if isinstance(where, str) else where[0]


def _files(where: Place) -> PartFiles | None:
    """The shards as files, where they are."""
    if _is_index(where) or is_remote(_first(where)):
        return None
    urls = expand(where) if isinstance(where, str) else where
    return PartFiles(Path(), [str(local_path(url)) for url in urls], shards=True)


def _select(index: ShardIndex, urls: Sequence[str]) -> ShardIndex:
    """The part of an index that is about ``urls``, which may name fewer shards."""
    numbers = {shard_name(shard.url): number for number, shard in enumerate(index.shards)}
    unknown = next((url for url in urls if shard_name(url) not in numbers), None)
    if unknown is not None:
        raise UserError(f"{unknown}: is not in the index beside it; index the shards again")
    if len({shard_name(url) for url in urls}) < len(urls):
        raise UserError(f"{urls[0]} and its siblings: two of them have one name; give each shard once")
    # Where the user says that they are; an index may have been made elsewhere.
    places = {shard_name(url): url for url in urls}
    shards = tuple(replace(shard, url=places.get(shard_name(shard.url), "")) for shard in index.shards)
    if len(urls) == len(index.shards):
        return replace(index, shards=shards)
    chosen = sorted(numbers[shard_name(url)] for url in urls)
    renumbered = torch.full((len(index.shards),), -1)
    renumbered[torch.tensor(chosen)] = torch.arange(len(chosen))
    samples = index.samples
    kept = (renumbered[samples.shards] >= 0).nonzero().flatten()
    names = {shard_name(index.shards[number].url) for number in chosen}
    return replace(
        index,
        shards=tuple(shards[number] for number in chosen),
        samples=SampleTable(
            PackedStrings.pack(samples.keys[row] for row in kept.tolist()),
            renumbered[samples.shards[kept]],
            samples.offsets[kept],
            samples.sizes[kept],
            samples.labels[kept],
        ),
        faults=tuple(fault for fault in index.faults if fault.key.partition("/")[0] in names),
    )


def _verify_sizes(index: ShardIndex) -> None:
    """Refuses local shards of another size than their index tells: cut, or replaced."""
    for shard in index.shards:
        if is_remote(shard.url):
            continue
        try:
            size = local_path(shard.url).stat().st_size
        except OSError as error:
            raise UserError(f"{shard.url}: cannot be read ({error.strerror}); its index names it") from None
        if size != shard.num_bytes:
            raise UserError(
                f"{shard.url}: has {size} bytes, but its index says {shard.num_bytes}; copy the shard again "
                "or index the shards again"
            )


def _info_beside(url: str) -> dict[str, int]:
    """Samples per shard by timm's listing beside a local shard; nothing where there is none."""
    for name in INFO_NAMES:
        address = sibling(url, name)
        if local_path(address).exists():
            return read_info(address)
    return {}


def _verify_apart(train: ShardIndex, test: ShardIndex) -> None:
    """Refuses a test part of training shards, as far as their addresses and checksums tell."""
    addresses = {shard.url for shard in train.shards}
    checksums = {shard.sha256 for shard in train.shards if shard.sha256 is not None}
    for shard in test.shards:
        if shard.url in addresses or shard.sha256 in checksums:
            raise UserError(f"data.test_path: {shard.url} is a training shard; keep the parts apart")


def _verify_counts(index: ShardIndex, counts: dict[str, int]) -> None:
    for shard in index.shards:
        expected = counts.get(shard_name(shard.url))
        if expected is not None and (found := index.count_all(shard)) != expected:
            raise UserError(
                f"{shard.url}: holds {found} samples, but timm's listing says {expected}; copy "
                "the shard again"
            )


def _class_names(index: ShardIndex, labels: Tensor) -> tuple[str, ...] | None:
    first = index.shards[0].url
    if index.classes is not None:
        _require_known(first, labels, len(index.classes))
        return tuple(index.classes)
    listing = Path() if is_remote(first) else local_path(first).with_name("classes.json")
    if not listing.is_file():
        return None
    try:
        classes = json.loads(fetch(str(listing)))
    except ValueError:
        classes = None
    if not isinstance(classes, list) or not classes:
        raise UserError(f"{listing}: not a JSON list of class names; correct or remove it")
    _require_known(str(listing.parent), labels, len(classes))
    return tuple(map(str, classes))


def _require_known(where: str, labels: Tensor, num_classes: int) -> None:
    highest = int(labels.max())
    if highest >= num_classes:
        raise UserError(
            f"{where}: found label {highest}, expected 0 to {num_classes - 1} (the known classes)"
        )
