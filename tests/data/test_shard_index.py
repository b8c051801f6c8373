from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mlomae.data import urls
from mlomae.data.faults import Fault
from mlomae.data.shards.index import read_index, read_info, write_index
from mlomae.data.shards.scan import scan
from mlomae.data.shards.table import PackedStrings, SampleTable, Shard, ShardIndex
from mlomae.errors import UserError
from tests.data.web import serve

Fill = Callable[..., None]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "DELAYS", (0.001,))


@pytest.fixture
def path(tmp_path: Path, fill_shard: Fill) -> Path:
    """An index of two shards in one folder, written."""
    for number in range(2):
        fill_shard(tmp_path / f"train-{number}.tar", 3 + number)
    write_index(tmp_path / "train-index.json", scan([str(tmp_path / f"train-{n}.tar") for n in range(2)]))
    return tmp_path / "train-index.json"


def assert_same(one: ShardIndex, other: ShardIndex) -> None:
    assert one.shards == other.shards
    assert one.samples.keys == other.samples.keys
    for name in ("shards", "offsets", "sizes", "labels"):
        column = getattr(one.samples, name)
        assert column.dtype == torch.int64 and torch.equal(column, getattr(other.samples, name))
    assert (one.classes, one.faults) == (other.classes, other.faults)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def replace_table(path: Path, **changes: Any) -> None:
    """Changes columns of the table, and its checksum."""
    table = path.with_suffix(".npz")
    with np.load(table) as arrays:
        columns = {**arrays, **changes}
    content = io.BytesIO()
    np.savez(content, **columns)
    table.write_bytes(content.getvalue())
    edit(path, samples={"file": table.name, "sha256": hashlib.sha256(content.getvalue()).hexdigest()})


def test_what_is_written_is_read(tmp_path: Path, fill_shard: Fill) -> None:
    fill_shard(tmp_path / "sub" / "val-0.tar", 3)
    fill_shard(tmp_path / "val-1.tar", 2)
    index = scan([str(tmp_path / "sub" / "val-0.tar"), str(tmp_path / "val-1.tar")], checksums=True)
    fault = Fault("val-1.tar/ü", "label", ".cls holds b'x', expected a class number")
    index = replace(index, classes=("tench", "é"), faults=(fault,))
    write_index(tmp_path / "val-index.json", index)
    assert_same(read_index(str(tmp_path / "val-index.json")), index)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [
        "sub",
        "val-1.tar",
        "val-index.json",
        "val-index.npz",
    ]
    written = json.loads((tmp_path / "val-index.json").read_text())
    assert written["__kind__"] == "wids-shard-index-v1" and written["wids_version"] == 1
    assert written["name"] == "val" and written["samples"]["file"] == "val-index.npz"
    content = (tmp_path / "sub" / "val-0.tar").read_bytes()
    assert written["shardlist"][0] == {
        "url": "sub/val-0.tar",
        "nsamples": 3,
        "filesize": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    before = (tmp_path / "val-index.npz").read_bytes()
    write_index(tmp_path / "val-index.json", index)
    assert (tmp_path / "val-index.npz").read_bytes() == before


def test_an_index_without_samples(tmp_path: Path, write_tar: Callable[..., None]) -> None:
    write_tar(tmp_path / "train-0.tar", {})
    for index in (scan([]), scan([str(tmp_path / "train-0.tar")])):
        write_index(tmp_path / "train-index.json", index)
        assert_same(read_index(str(tmp_path / "train-index.json")), index)


def test_large_shards_and_labels(tmp_path: Path) -> None:
    columns = [[0, 0, 1], [512, 2**33, 2**40], [2**32, 5, 0], [-1, 2**31 - 1, 0]]
    table = SampleTable(["a/1", "a/2", "b/" + "x" * 70_000], *(torch.tensor(column) for column in columns))
    index = ShardIndex((Shard("/a", 2, 2**34), Shard("/b", 1, 2**41)), table)
    write_index(tmp_path / "t-index.json", index)
    assert_same(read_index(str(tmp_path / "t-index.json")), index)


def test_the_table_is_small(tmp_path: Path) -> None:
    count = 100_000
    rows = torch.arange(count)
    keys = [f"train-{row // 1000:06d}.tar/n{row % 1000:08d}" for row in range(count)]
    index = ShardIndex(
        tuple(Shard(f"train-{number:06d}.tar", 1000, 2**27) for number in range(100)),
        SampleTable(keys, rows // 1000, rows % 1000 * 110_000 + 1536, 100_000 + rows % 777, rows % 1000),
    )
    write_index(tmp_path / "train-index.json", index)
    assert (tmp_path / "train-index.npz").stat().st_size < 12 * count
    assert read_index(str(tmp_path / "train-index.json")).samples.keys == keys


def test_shards_are_found_beside_the_index(path: Path) -> None:
    moved = path.parent.with_name("moved")
    path.parent.rename(moved)
    index = read_index(str(moved / path.name))
    assert [shard.url for shard in index.shards] == [f"{moved}/train-0.tar", f"{moved}/train-1.tar"]
    with serve(moved) as web:
        remote = read_index(f"{web.url}/{path.name}")
        assert [shard.url for shard in remote.shards] == [f"{web.url}/train-{n}.tar" for n in range(2)]
        assert remote.samples.keys == index.samples.keys
        assert web.requests == ["/train-index.json", "/train-index.npz"]
    piped = read_index(f"pipe:cat {moved}/{path.name}")
    assert piped.shards[1].url == f"pipe:cat {moved}/train-1.tar"


def test_shards_that_lie_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [
        "/data/a.tar",
        "http://h/b.tar?x=1",
        "pipe:cat /secret/c.tar | cat",
        "d.tar",
        "file:///data/e.tar",
    ]
    table = SampleTable([], *(torch.zeros(0, dtype=torch.int64) for _ in range(4)))
    (tmp_path / "cwd" / "index").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    write_index(Path("index/t-index.json"), ShardIndex(tuple(Shard(url, 0, 0) for url in given), table))
    found = [shard.url for shard in read_index("index/t-index.json").shards]
    here = f"{tmp_path}/cwd/d.tar"  # a command is never written down: c.tar is looked for beside the index
    assert found == ["/data/a.tar", "http://h/b.tar?x=1", "index/c.tar", here, "/data/e.tar"]


def test_an_index_never_runs_a_command(path: Path, tmp_path: Path) -> None:
    command = f"pipe:touch {tmp_path}/ran #x.tar"
    edit(path, shardlist=[{"url": command, "nsamples": 1}])
    with pytest.raises(UserError, match=r"an index must not hold a command \(pipe:touch"):
        read_index(str(path))
    edit(path, shardlist=[{"url": f"x.tar; touch {tmp_path}/ran", "nsamples": 1}])
    with pytest.raises(UserError, match="not a plain file name"):
        read_index(f"pipe:cat {path}")
    edit(path, shardlist=[], samples={"file": f"x.npz; touch {tmp_path}/ran", "sha256": ""})
    with pytest.raises(UserError, match="not a plain file name"):
        read_index(f"pipe:cat {path}")
    assert not (tmp_path / "ran").exists()


SHARD = {"url": "train-0.tar", "nsamples": 3, "filesize": 10**6}
OTHER = {**SHARD, "url": "train-1.tar", "nsamples": 4}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"shardlist": None}, "has no list of shards with url and nsamples; write it again"),
        ({"shardlist": [{"url": "a.tar"}]}, "has no list of shards"),
        ({"shardlist": [{**SHARD, "nsamples": -1}, OTHER]}, "has no list of shards"),
        ({"shardlist": [{**SHARD, "nsamples": 2**70}, OTHER]}, "has no list of shards"),
        ({"shardlist": [{**SHARD, "nsamples": True}, OTHER]}, "has no list of shards"),
        ({"shardlist": ["a.tar"]}, "has no list of shards"),
        ({"shardlist": [SHARD, SHARD]}, "has two shards of one name"),
        ({"shardlist": [SHARD]}, "has other numbers of samples than the list of shards"),
        ({"shardlist": [OTHER, {**SHARD, "url": "train-1.tar/x"}]}, "has other numbers of samples"),
        ({"shardlist": [{**SHARD, "nsamples": 2**61}, OTHER]}, "has other numbers of samples"),
        ({"shardlist": [{**SHARD, "filesize": 600}, OTHER]}, "has images beyond the end of their shards"),
        ({"wids_version": 2}, "has wids_version 2, expected 1"),
        ({"samples": "x.npz"}, "an entry is missing or of the wrong kind"),
        ({"samples": {"file": "train-index.npz"}}, "an entry is missing"),
        (
            {"samples": {"file": "train-index.npz", "sha256": "0"}},
            r"npz: is not the table that .*\.json describes",
        ),
        ({"samples": {"file": "none.npz", "sha256": "0"}}, r"none\.npz: cannot be read after 2 attempts"),
        ({"classes": "abc"}, "an entry is missing or of the wrong kind"),
        ({"faults": [["key", "no such kind", "reason"]]}, "an entry is missing or of the wrong kind"),
        ({"faults": [["key"]]}, "an entry is missing or of the wrong kind"),
    ],
)
def test_a_damaged_description_is_refused(path: Path, changes: dict[str, Any], message: str) -> None:
    edit(path, **changes)
    with pytest.raises(UserError, match=message) as caught:
        read_index(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"labels": np.zeros(6, np.int8)}, "has columns of different lengths"),
        ({"labels": np.full(7, -2)}, "has negative labels"),
        ({"labels": np.zeros(7)}, "is not a table of samples"),
        ({"labels": np.array([{}] * 7)}, "is not a table of samples"),
        ({"offsets": np.full(7, -1)}, "has images beyond the end of their shards"),
        ({"offsets": np.full(7, 2**63 - 1)}, "has images beyond the end of their shards"),
        ({"sizes": np.full(7, 2**63 - 1)}, "has images beyond the end of their shards"),
        ({"sizes": np.full(7, -1)}, "has images beyond the end of their shards"),
        ({"shards": np.array([0, 0, 1, 0, 1, 1, 1])}, "has other numbers of samples"),
        ({"shards": np.full(7, 9)}, "has other numbers of samples"),
        ({"key_sizes": np.full(7, 3)}, "has keys of other sizes than it says"),
        ({"key_sizes": np.arange(-1, 6) * 8}, "has keys of other sizes than it says"),
        ({"keys": np.zeros(0, np.uint8)}, "has keys of other sizes than it says"),
    ],
)
def test_a_damaged_table_is_refused(path: Path, changes: dict[str, Any], message: str) -> None:
    replace_table(path, **changes)
    with pytest.raises(UserError, match=message):
        read_index(str(path))


def test_half_of_an_index_is_refused(path: Path) -> None:
    whole, table = path.read_bytes(), path.with_suffix(".npz").read_bytes()
    path.with_suffix(".npz").write_bytes(table[:-1])
    with pytest.raises(
        UserError, match=r"train-index\.npz: is not the table that .*train-index\.json describes"
    ):
        read_index(str(path))
    for content in (whole[: len(whole) // 2], b"", b"[]", b"\xff", b"[" * 10**5):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"train-index\.json: is not a JSON object; write it again"):
            read_index(str(path))
    for content in (b"", b"PK", table[: len(table) // 2], np.zeros(3).tobytes()):
        path.with_suffix(".npz").write_bytes(content)
        path.write_bytes(whole)
        edit(path, samples={"file": "train-index.npz", "sha256": hashlib.sha256(content).hexdigest()})
        with pytest.raises(UserError, match=r"train-index\.npz: is not a table of samples"):
            read_index(str(path))


def test_an_index_that_cannot_be_written(tmp_path: Path) -> None:
    target = tmp_path / "none" / "train-index.json"
    with pytest.raises(
        UserError, match=re.escape(f"{target}: cannot be written (No such file or directory)")
    ):
        write_index(target, scan([]))


def test_an_index_of_another_program(tmp_path: Path) -> None:
    path = tmp_path / "index.json"
    shards = [{"url": "a.tar", "nsamples": 5}, {"url": "http://h/b.tar", "nsamples": 6, "filesize": 99}]
    path.write_text(json.dumps({"wids_version": 1, "name": "x", "shardlist": shards}))
    with pytest.raises(UserError, match=r"index\.json: has no table of samples; write the index again with"):
        read_index(str(path))


def test_wids_opens_the_index(path: Path, tmp_path: Path) -> None:
    wids = pytest.importorskip("wids", reason="wids is not installed")
    dataset = wids.ShardListDataset(str(path), cache_dir=str(tmp_path / "cache"), transformations=[])
    assert len(dataset) == 7
    assert dataset[4]["__key__"] == "s001" and dataset[4][".cls"].read() == b"1"


def test_information_of_timm(tmp_path: Path) -> None:
    info = {
        "splits": {
            "train": {
                "name": "train",
                "filenames": ["x-train-0.tar", "x-train-1.tar"],
                "shard_lengths": [10, 9],
                "num_samples": 19,
            },
            "validation": {"filenames": ["x-validation-0.tar"], "shard_lengths": [4]},
        }
    }
    (tmp_path / "_info.json").write_text(json.dumps(info))
    (tmp_path / "_info.yaml").write_text(
        "splits: {train: {filenames: [x-train-0.tar, x-train-1.tar], shard_lengths: [10, 9]},"
        " validation: {filenames: [x-validation-0.tar], shard_lengths: [4]}}"
    )
    for name in ("_info.json", "_info.yaml"):
        assert read_info(str(tmp_path / name)) == {
            "x-train-0.tar": 10,
            "x-train-1.tar": 9,
            "x-validation-0.tar": 4,
        }
    for content in ("{}", '{"splits": []}', '{"splits": {"a": {"filenames": ["x"], "shard_lengths": []}}}'):
        (tmp_path / "_info.json").write_text(content)
        with pytest.raises(UserError, match=r'_info\.json: expected \{"splits": \{"train": \{"filenames"'):
            read_info(str(tmp_path / "_info.json"))


def test_packed_strings_are_a_sequence() -> None:
    strings = ["", "a", "日本/ü", "caf\udce9", "a"]
    packed = PackedStrings.pack(strings)
    assert len(packed) == 5 and list(packed) == strings and packed == strings and strings == packed
    assert [packed[number] for number in range(-5, 5)] == [*strings, *strings]
    assert packed[1:4] == strings[1:4] and packed[::-2] == strings[::-2]
    assert repr(packed) == "PackedStrings(5 strings)"
    assert packed.index("日本/ü") == 2 and "b" not in packed and packed.count("a") == 2
    assert packed != [*strings[:4], "b"] and packed != strings[:4] and packed != "abcde" and packed != 5
    with pytest.raises(IndexError):
        packed[5]
    with pytest.raises(IndexError):
        packed[-6]
    assert pickle.loads(pickle.dumps(packed)) == packed
    assert PackedStrings.join([packed, PackedStrings.pack([]), packed]) == strings * 2
    assert list(PackedStrings.join([])) == []


def test_packed_strings_take_little_memory() -> None:
    packed = PackedStrings.pack(f"train-000001.tar/n{number:08d}" for number in range(10_000))
    assert len(pickle.dumps(packed)) < 10_000 * (26 + 8) + 1000
