"""Finds sets of shards, and whether they are what their indexes say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch

from mlomae.data.decoding import decode_image
from mlomae.data.faults import BadSample
from mlomae.data.shards.index import read_index, read_info
from mlomae.data.shards.scan import scan_shard
from mlomae.data.shards.sets import INFO_NAMES, part_name
from mlomae.data.shards.source import ShardSource
from mlomae.data.shards.table import Shard, ShardIndex
from mlomae.data.urls import expand, is_remote, local_path, shard_name, sibling
from mlomae.errors import UserError

Report = Callable[[int, int], None]
"""Called with shards done, and of how many."""


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be.

    Attributes:
        shard: name of the shard, or of another file.
    """

    shard: str
    found: str
    expected: str


@dataclass(frozen=True)
class Verification:
    """What was looked at, and what is wrong with it.

    Attributes:
        known_faults: samples that the indexes name as bad.
        unindexed: parts without an index, whose shards were compared with none.
    """

    shards: int
    samples: int
    num_bytes: int
    known_faults: int
    unindexed: tuple[str, ...]
    problems: tuple[Problem, ...]


@dataclass
class ShardSet:
    """The shards of one part: where they lie, and what is said about them.

    Attributes:
        complete: whether ``urls`` are all that there are, so that nothing may name others.
        counts: {shard name: samples} by timm's listing.
    """

    part: str
    urls: list[str]
    index: ShardIndex | None = None
    complete: bool = True
    counts: dict[str, int] = field(default_factory=dict)

    @cached_property
    def numbers(self) -> dict[str, int]:
        """{shard name: number in the index}"""
        shards = () if self.index is None else self.index.shards
        return {shard_name(shard.url): number for number, shard in enumerate(shards)}

    @cached_property
    def known_faults(self) -> set[str]:
        """Keys of samples that the index names as bad."""
        return set() if self.index is None else {fault.key for fault in self.index.faults}


def verify(where: str, quick: bool, decode: bool, workers: int, report: Report) -> Verification:
    """Compares shards with their index and with timm's listing, where there are any.

    Args:
        where: a folder, the address of an index, or a pattern of shards.
        quick: leaves out checksums, so that only headers and labels of local shards are read.
        decode: decodes every image.
        workers: shards that are read at the same time.

    Raises:
        UserError: there is nothing to look at.
    """
    problems: list[Problem] = []
    sets = find_sets(where, problems)
    pool = ThreadPoolExecutor(workers)
    jobs = [pool.submit(_verify_shard, one, url, quick, decode) for one in sets for url in one.urls]
    try:
        for done, _ in enumerate(as_completed(jobs), 1):
            report(done, len(jobs))
        results = [job.result() for job in jobs]
    finally:
        pool.shutdown(cancel_futures=True)
    problems += [problem for found, _ in results for problem in found]
    problems += [problem for one in sets for problem in _compare_lists(one)]
    shards = [shard for _, shard in results if shard is not None]
    return Verification(
        len(jobs),
        sum(shard.num_samples for shard in shards),
        sum(shard.num_bytes for shard in shards),
        sum(len(one.known_faults) for one in sets),
        tuple(one.part for one in sets if one.index is None),
        tuple(problems),
    )


def find_sets(where: str, problems: list[Problem]) -> list[ShardSet]:
    """The shards behind ``where`` by part, training first.

    Args:
        where: a folder, the address of an index, or a pattern of shards.
        problems: receives indexes and listings that cannot be read.

    Raises:
        UserError: there are none.
    """
    if not is_remote(where) and local_path(where).is_dir():
        return list(_sets_in(local_path(where), problems))
    if shard_name(where).endswith(".json"):
        index = _try_index(where, problems)
        part = part_name(where).removesuffix("-index")
        folder = None if is_remote(where) else local_path(where).parent
        return [] if index is None else [_set_of(part, index, folder, problems)]
    groups: dict[str, list[str]] = {}
    for url in expand(where):
        groups.setdefault(part_name(url), []).append(url)
    sets = []
    for part, urls in groups.items():
        one = ShardSet(part, urls, complete=False)
        address = sibling(urls[0], f"{part}-index.json")
        if is_remote(address):
            one.index = _try_index(address, [])  # there may be none
        else:
            one.counts = _read_counts(local_path(address).parent, problems)
            if local_path(address).exists():
                one.index = _try_index(address, problems)
        sets.append(one)
    return sets


def _sets_in(folder: Path, problems: list[Problem]) -> Iterator[ShardSet]:
    parts = {part_name(path.name) for path in folder.glob("*.tar")}
    parts |= {path.name.removesuffix("-index.json") for path in folder.glob("*-index.json")}
    if not parts:
        raise UserError(f"{folder}: no shards and no index; expected train-*.tar or train-index.json")
    for part in sorted(parts, key=lambda part: (part != "train", part)):
        address = folder / f"{part}-index.json"
        index = _try_index(str(address), problems) if address.exists() else None
        yield _set_of(part, index, folder, problems)


def _set_of(part: str, index: ShardIndex | None, folder: Path | None, problems: list[Problem]) -> ShardSet:
    """The shards that the index names, and others of the part that lie in the folder."""
    one = ShardSet(part, [] if index is None else [shard.url for shard in index.shards], index)
    if folder is not None:
        paths = sorted(path for path in folder.glob("*.tar") if part_name(path.name) == part)
        one.urls += [str(path) for path in paths if path.name not in one.numbers]
        one.counts = _read_counts(folder, problems)
    return one


def _try_index(address: str, problems: list[Problem]) -> ShardIndex | None:
    try:
        return read_index(address)
    except UserError as error:
        problems.append(Problem(shard_name(address), str(error), "a readable index"))
        return None


def _read_counts(folder: Path, problems: list[Problem]) -> dict[str, int]:
    """Samples per shard by timm's listing; nothing where there is none."""
    for name in INFO_NAMES:
        if (folder / name).exists():
            try:
                return read_info(str(folder / name))
            except UserError as error:
                problems.append(Problem(name, str(error), "a readable listing"))
    return {}


def _verify_shard(one: ShardSet, url: str, quick: bool, decode: bool) -> tuple[list[Problem], Shard | None]:
    """What is wrong with one shard, and what it is if it can be read."""
    name = shard_name(url)
    if not is_remote(url) and not local_path(url).exists():
        expected = "the shard, which the index names" if name in one.numbers else "a shard"
        return [Problem(name, "no such file", expected)], None
    try:
        fresh = scan_shard(url, 0, not quick)
    except UserError as error:
        found = str(error).removeprefix(f"{url}: ").partition("; ")[0]
        return [*_compare_size(one, name, url), Problem(name, found, "a complete shard")], None
    problems = [*_compare_with_index(one, name, fresh), *_compare_with_counts(one, name, fresh)]
    problems += [
        Problem(name, f"{fault.key}: {fault.reason} ({fault.kind})", "a usable sample")
        for fault in fresh.faults
        if fault.key not in one.known_faults
    ]
    if decode:
        problems += _undecodable(name, fresh)
    return problems, fresh.shards[0]


def _compare_size(one: ShardSet, name: str, url: str) -> Iterator[Problem]:
    """Of a shard that cannot be read otherwise."""
    if one.index is not None and name in one.numbers and not is_remote(url):
        expected = one.index.shards[one.numbers[name]].num_bytes
        if (found := local_path(url).stat().st_size) != expected:
            yield _other_size(name, found, expected)


def _compare_with_index(one: ShardSet, name: str, fresh: ShardIndex) -> Iterator[Problem]:
    if one.index is None:
        return
    if name not in one.numbers:
        yield Problem(name, "not in the index", "only shards that the index names")
        return
    number, here = one.numbers[name], fresh.shards[0]
    there = one.index.shards[number]
    if here.num_bytes != there.num_bytes:
        yield _other_size(name, here.num_bytes, there.num_bytes)
    if here.num_samples != there.num_samples:
        yield Problem(name, f"{here.num_samples} samples", f"{there.num_samples} samples by the index")
    elif (rows := _count_differences(one.index, number, fresh)) > 0:
        yield Problem(name, f"{rows} samples of other keys, places or labels", "the samples of the index")
    if None not in (here.sha256, there.sha256) and here.sha256 != there.sha256:
        yield Problem(name, f"SHA-256 {here.sha256}", f"SHA-256 {there.sha256} by the index")


def _other_size(name: str, found: int, expected: int) -> Problem:
    return Problem(name, f"{found} bytes", f"{expected} bytes by the index")


def _count_differences(index: ShardIndex, number: int, fresh: ShardIndex) -> int:
    """Samples of one shard that are not as the index says; their numbers are equal."""
    there, here = index.samples, fresh.samples
    first, last = torch.searchsorted(there.shards, torch.tensor([number, number + 1])).tolist()
    differ = torch.zeros(last - first, dtype=torch.bool)
    for name in ("offsets", "sizes", "labels"):
        differ |= getattr(there, name)[first:last] != getattr(here, name)
    keys = [there.keys[first + row] != key for row, key in enumerate(here.keys)]
    return int((differ | torch.tensor(keys, dtype=torch.bool)).sum())


def _compare_with_counts(one: ShardSet, name: str, fresh: ShardIndex) -> Iterator[Problem]:
    found, listed = fresh.count_all(fresh.shards[0]), one.counts.get(name)
    if listed is not None and listed != found:
        yield Problem(name, f"{found} samples", f"{listed} samples by {INFO_NAMES[0]}")


def _undecodable(name: str, fresh: ShardIndex) -> Iterator[Problem]:
    source = ShardSource(fresh)
    for row, key in enumerate(source.keys):
        try:
            decode_image(source.content(row), 3)
        except BadSample as bad:
            yield Problem(name, f"{key}: {bad.reason} ({bad.kind})", "an image that decodes")


def _compare_lists(one: ShardSet) -> Iterator[Problem]:
    """Where the index and timm's listing contradict each other, or the listing and the shards."""
    names = {shard_name(url) for url in one.urls}
    for name, count in one.counts.items():
        if part_name(name) != one.part:
            continue
        if one.complete and name not in names:
            yield Problem(name, "no such file", f"the shard, which {INFO_NAMES[0]} names")
        elif one.index is not None and name in one.numbers:
            indexed = one.index.count_all(one.index.shards[one.numbers[name]])
            if indexed != count:
                yield Problem(name, f"{count} samples by {INFO_NAMES[0]}", f"{indexed} samples by the index")
    if one.complete and one.counts:
        for name in sorted(names - one.counts.keys()):
            yield Problem(name, f"not in {INFO_NAMES[0]}", "every shard in it")
