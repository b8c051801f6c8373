"""Writes the indexes of shards that other programs have made."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from mlomae.data.shards.index import write_index
from mlomae.data.shards.scan import scan
from mlomae.data.shards.sets import part_name
from mlomae.data.shards.table import ShardIndex
from mlomae.data.urls import expand, fetch, is_remote, local_path
from mlomae.errors import UserError


def index_shards(
    pattern: str, out: Path, part: str | None, classes: str | None, checksums: bool, workers: int
) -> dict[Path, ShardIndex]:
    """Scans shards, and writes ``<part>-index.json`` and ``.npz`` of each part into the folder ``out``.

    Args:
        pattern: of shards, or a local folder of them.
        part: of all of them; by default what their names begin with.
        classes: address of a JSON list of class names; by default classes.json beside local shards.
        checksums: also reads local shards whole; remote ones always are.
        workers: remote shards that are read at the same time.

    Returns:
        {path of the index: index}

    Raises:
        UserError: there are no shards, they cannot be read, or ``out`` cannot be written.
    """
    is_folder = not is_remote(pattern) and local_path(pattern).is_dir()
    urls = expand(f"{local_path(pattern)}/*.tar" if is_folder else pattern)
    groups: dict[str, list[str]] = {}
    for url in urls:
        name = part or part_name(url)
        if not name:
            raise UserError(f"{url}: its name tells no part; give --part train, test or val")
        groups.setdefault(name, []).append(url)
    names = read_classes(urls[0], classes)
    written: dict[Path, ShardIndex] = {}
    for name, members in groups.items():
        index = replace(scan(members, workers, checksums), classes=names)
        if not len(index.samples):
            raise UserError(f"{members[0]}: no samples in it and its siblings; expected images")
        path = out / f"{name}-index.json"
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_index(path, index)
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        written[path] = index
    return written


def read_classes(shard: str, address: str | None = None) -> tuple[str, ...] | None:
    """The class names at ``address`` or, without one, beside a local shard; None where there are none.

    Raises:
        UserError: it is no list of names.
    """
    if address is None:
        beside = None if is_remote(shard) else local_path(shard).parent / "classes.json"
        if beside is None or not beside.exists():
            return None
        address = str(beside)
    try:
        names = json.loads(fetch(address))
    except ValueError:
        names = None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{address}: not a JSON list of class names; correct or remove it")
    return tuple(names)
