"""Index files: a part's shards in the format of wids, and beside it the table of their samples.

``<part>-index.json`` is what wids reads (``ShardListDataset``), and names ``<part>-index.npz``.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import torch

from mlomae.data.faults import Fault, Kind
from mlomae.data.shards.table import PackedStrings, SampleTable, Shard, ShardIndex
from mlomae.data.urls import fetch, is_remote, local_path, shard_name, sibling
from mlomae.errors import UserError
from mlomae.run_dir import write_atomically

KIND = "wids-shard-index-v1"
COLUMNS = ("shards", "offsets", "sizes", "labels")


def write_index(path: Path, index: ShardIndex) -> None:
    """Writes ``<part>-index.npz`` and then ``<part>-index.json``; ``read_index`` notices half a pair.

    Shards below the folder of ``path`` are named relative to it: the folder may move.

    Raises:
        UserError: it cannot be written.
    """
    table = path.with_suffix(".npz")
    content = _pack_table(index.samples)
    description: dict[str, Any] = {
        "__kind__": KIND,
        "wids_version": 1,
        "name": path.stem.removesuffix("-index"),
        "shardlist": [_describe(shard, path.parent) for shard in index.shards],
        "samples": {"file": table.name, "sha256": hashlib.sha256(content).hexdigest()},
    }
    if index.classes is not None:
        description["classes"] = list(index.classes)
    if index.faults:
        description["faults"] = [[fault.key, fault.kind, fault.reason] for fault in index.faults]
    try:
        write_atomically(table, content)
        write_atomically(path, (json.dumps(description, indent=1) + "\n").encode())
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another folder") from None


def read_index(url: str) -> ShardIndex:
    """Reads what ``write_index`` wrote; the shards lie where the index says, relative to ``url``.

    Raises:
        UserError: it cannot be read, is damaged or contradicts itself, or another program wrote it, which
            knows nothing of single samples.
    """
    description = _read_object(url)
    shards = _read_shards(url, description)
    if "samples" not in description:
        raise UserError(f"{url}: has no table of samples; write the index again with mlomae shards index")
    try:
        name, expected = str(description["samples"]["file"]), description["samples"]["sha256"]
        classes = None if "classes" not in description else _strings(description["classes"])
        faults = tuple(_read_fault(entry) for entry in description.get("faults", ()))
    except (KeyError, TypeError, ValueError):
        raise _damaged(url, "an entry is missing or of the wrong kind") from None
    table = sibling(url, name)
    content = fetch(table)
    if hashlib.sha256(content).hexdigest() != expected:
        raise _damaged(table, f"is not the table that {url} describes")
    samples = _unpack_table(table, content)
    _check(table, shards, samples)
    return ShardIndex(shards, samples, classes, faults)


def read_info(url: str) -> dict[str, int]:
    """{shard name: samples} of all parts in timm's ``_info.json`` (or ``.yaml``)."""
    info = _read_object(url)
    counts: dict[str, int] = {}
    try:
        for split in info["splits"].values():
            for name, count in zip(split["filenames"], split["shard_lengths"], strict=True):
                counts[shard_name(name)] = _count(count)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise UserError(
            f'{url}: expected {{"splits": {{"train": {{"filenames": […], "shard_lengths": […]}}}}}}'
        ) from None
    return counts


def _describe(shard: Shard, folder: Path) -> dict[str, Any]:
    url = shard.url
    if url.startswith("pipe:"):
        url = shard_name(url)  # reading an index must never run a command out of it
    elif not is_remote(url):
        path, base = (Path(os.path.abspath(path)) for path in (local_path(url), folder))
        url = path.relative_to(base).as_posix() if path.is_relative_to(base) else str(path)
    entry = {"url": url, "nsamples": shard.num_samples, "filesize": shard.num_bytes}
    return entry if shard.sha256 is None else {**entry, "sha256": shard.sha256}


def _read_object(url: str) -> dict[str, Any]:
    import yaml

    content = fetch(url)
    try:
        if shard_name(url).endswith((".yaml", ".yml")):
            value = yaml.safe_load(content)
        else:
            value = json.loads(content)
    except (ValueError, RecursionError, yaml.YAMLError):
        value = None
    if not isinstance(value, dict):
        raise _damaged(url, "is not a JSON object")
    return value


def _read_shards(url: str, description: dict[str, Any]) -> tuple[Shard, ...]:
    """The shard list; an unknown size is -1."""
    version = description.get("wids_version", 1)
    if version != 1:
        raise _damaged(url, f"has wids_version {version!r}, expected 1")
    try:
        shards = tuple(
            Shard(
                _resolve(url, str(entry["url"])),
                _count(entry["nsamples"]),
                _count(entry["filesize"]) if "filesize" in entry else -1,
                str(entry["sha256"]) if "sha256" in entry else None,
            )
            for entry in description["shardlist"]
        )
    except (KeyError, TypeError, ValueError, AttributeError):
        raise _damaged(url, "has no list of shards with url and nsamples") from None
    if len({shard_name(shard.url) for shard in shards}) < len(shards):
        raise _damaged(url, "has two shards of one name")
    return shards


def _read_fault(entry: Any) -> Fault:
    key, kind, reason = _strings(entry)
    if kind not in get_args(Kind):
        raise ValueError
    return Fault(key, cast(Kind, kind), reason)


def _strings(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError
    return tuple(value)


def _resolve(url: str, shard: str) -> str:
    if shard.startswith("pipe:"):
        raise UserError(f"{url}: an index must not hold a command ({shard}); name the shard's file instead")
    return shard if is_remote(shard) or shard.startswith(("/", "file:")) else sibling(url, shard)


def _count(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError
    return value


def _pack_table(samples: SampleTable) -> bytes:
    keys = samples.keys if isinstance(samples.keys, PackedStrings) else PackedStrings.pack(samples.keys)
    arrays = {name: _compact(getattr(samples, name).numpy()) for name in COLUMNS}
    arrays["keys"] = np.frombuffer(keys.blob, np.uint8)
    arrays["key_sizes"] = _compact(np.diff(keys.ends, prepend=0))
    content = io.BytesIO()
    np.savez_compressed(content, allow_pickle=False, **arrays)
    return content.getvalue()


def _compact(values: np.ndarray) -> np.ndarray:
    """The same numbers in the smallest signed type that holds them."""
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 0)
    ranges = ((kind, np.iinfo(kind)) for kind in (np.int8, np.int16, np.int32, np.int64))
    return values.astype(next(kind for kind, range in ranges if range.min <= low and high <= range.max))


def _unpack_table(url: str, content: bytes) -> SampleTable:
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            blob, key_sizes = arrays["keys"].tobytes(), arrays["key_sizes"].astype(np.int64, casting="safe")
            columns = {
                name: torch.from_numpy(arrays[name].astype(np.int64, casting="safe")) for name in COLUMNS
            }
    except (OSError, EOFError, KeyError, ValueError, TypeError, AttributeError, zipfile.BadZipFile):
        raise _damaged(url, "is not a table of samples") from None
    if (key_sizes < 0).any() or key_sizes.sum() != len(blob):
        raise _damaged(url, "has keys of other sizes than it says")
    return SampleTable(PackedStrings(blob, np.cumsum(key_sizes)), **columns)


def _check(url: str, shards: tuple[Shard, ...], samples: SampleTable) -> None:
    """That the table suits the shards."""
    if any(getattr(samples, name).shape != (len(samples),) for name in COLUMNS):
        raise _damaged(url, "has columns of different lengths")
    counts = [shard.num_samples for shard in shards]
    numbers = torch.arange(len(shards))
    if sum(counts) != len(samples) or not torch.equal(
        samples.shards, numbers.repeat_interleave(torch.tensor(counts, dtype=torch.int64))
    ):
        raise _damaged(url, "has other numbers of samples than the list of shards")
    limits = torch.tensor([shard.num_bytes for shard in shards], dtype=torch.int64)[samples.shards]
    inside = (samples.offsets >= 0) & (samples.sizes >= 0) & (samples.offsets <= limits - samples.sizes)
    if not inside.all():
        raise _damaged(url, "has images beyond the end of their shards")
    if (samples.labels < -1).any():
        raise _damaged(url, "has negative labels")


def _damaged(url: str, reason: str) -> UserError:
    return UserError(f"{url}: {reason}; write it again")
