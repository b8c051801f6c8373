"""Makes shards for tests, and takes them apart."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlomae.errors import UserError
from mlomae.sharding import writer
from mlomae.sharding.encoding import Encoding
from mlomae.sharding.inputs import open_inputs
from mlomae.sharding.writer import Created, Layout, create_shards

Members = dict[str, bytes]


def create(
    source: Path | str,
    out: Path,
    per_shard: int = 1000,
    seed: int | None = 0,
    workers: int = 1,
    share: float = 0.0,
    root: Path | None = None,
    parts: tuple[str, ...] = (),
    report: writer.Report = lambda *counts: None,
    **encoding: Any,
) -> Created:
    inputs = open_inputs(str(source), root, parts=parts)
    return create_shards(inputs, out, Encoding(**encoding), Layout(per_shard, seed), workers, share, report)


def members(*shards: Path) -> Members:
    found: Members = {}
    for shard in shards:
        with tarfile.open(shard) as tar:
            for member in tar:
                assert member.name not in found
                assert (member.mtime, member.uid, member.gid, member.uname) == (0, 0, 0, "")
                file = tar.extractfile(member)
                assert file is not None
                found[member.name] = file.read()
    return found


def by_source(out: Path, part: str = "train") -> dict[str, tuple[str, bytes, dict[str, Any]]]:
    """{source: (suffix, image, json)} of all samples of a part."""
    found = members(*sorted(out.glob(f"{part}-*.tar")))
    samples = {}
    for name in [name for name in found if name.endswith(".json")]:
        about = json.loads(found[name])
        key = name.removesuffix(".json")
        suffixes = {other.partition(".")[2] for other in found if other.startswith(f"{key}.")}
        (suffix,) = suffixes - {"cls", "json"}
        assert found.get(f"{key}.cls") == (str(about["label"]).encode() if "label" in about else None)
        samples[about["source"]] = suffix, found[f"{key}.{suffix}"], about
    return samples


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def pixels(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def refused(*arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        create(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message
