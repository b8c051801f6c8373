from __future__ import annotations

import hashlib
import random
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from webdataset.tariterators import base_plus_ext, group_by_keys, tar_file_iterator

from mlomae.data.faults import Fault
from mlomae.data.shards.scan import scan, scan_shard
from mlomae.data.shards.table import ShardIndex
from mlomae.errors import UserError
from tests.data.archives import member, odd_members, write
from tests.data.web import Web, serve

pytestmark = pytest.mark.usefixtures("quick_retries")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    with serve(tmp_path) as server:
        yield server


def rows(index: ShardIndex) -> list[tuple[str, int, int, int, int]]:
    samples = index.samples
    columns = (samples.shards, samples.offsets, samples.sizes, samples.labels)
    return list(zip(samples.keys, *(column.tolist() for column in columns), strict=True))


def images(path: Path, index: ShardIndex) -> dict[str, bytes]:
    content = path.read_bytes()
    return {key: content[offset : offset + size] for key, _, offset, size, _ in rows(index)}


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_those_of_webdataset(tmp_path: Path, format: int) -> None:
    path = tmp_path / "a.tar"
    write(path, odd_members(), format=format)
    with path.open("rb") as file:
        entries = [{**entry, "__url__": ""} for entry in tar_file_iterator(file)]
        # The hidden file and the metadata, which are no samples here.
        groups = [group for group in group_by_keys(entries) if group["__key__"] not in ("dir/", "__meta__")]
    index = scan_shard(str(path))
    assert index.faults == () and len(index.samples) == 10
    assert images(path, index) == {
        f"a.tar/{group['__key__']}": group.get("jpg", group.get("png")) for group in groups
    }
    assert index.samples.labels.tolist() == [int(group.get("cls", -1)) for group in groups]


def test_a_key_is_that_of_webdataset(tmp_path: Path) -> None:
    random.seed(0)
    names = {"".join(random.choices("ab./_", k=random.randint(1, 9))) + ".jpg" for _ in range(600)}
    names = {name for name in names if base_plus_ext(name)[1] == "jpg" and not name.startswith("/")}
    names = {name for name in names if ".." not in name.split("/") and not name.startswith("__")}
    write(tmp_path / "a.tar", [member(name, b"x") for name in sorted(names)])
    expected = [base_plus_ext(name)[0] for name in sorted(names)]
    keys = [f"a.tar/{key}" for key in expected if not key.endswith("/")]
    assert len(keys) > 100
    assert scan_shard(str(tmp_path / "a.tar")).samples.keys == keys


def test_a_part_is_in_the_order_of_its_shards(tmp_path: Path, fill_shard: Callable[..., None]) -> None:
    for number, count in enumerate((3, 1, 2)):
        fill_shard(tmp_path / f"train-{number}.tar", count)
    paths = [str(tmp_path / f"train-{number}.tar") for number in (2, 0, 1)]
    index = scan(paths)
    assert [shard.url for shard in index.shards] == paths
    assert [shard.num_samples for shard in index.shards] == [2, 3, 1]
    assert [shard.num_bytes for shard in index.shards] == [Path(path).stat().st_size for path in paths]
    assert index.samples.keys == [
        f"train-{s}.tar/s{n:03d}" for s, c in ((2, 2), (0, 3), (1, 1)) for n in range(c)
    ]
    assert index.samples.shards.tolist() == [0, 0, 1, 1, 1, 2]
    assert index.samples.labels.tolist() == [0, 1, 0, 1, 0, 0]
    assert index.samples.shards.dtype == index.samples.offsets.dtype == torch.int64
    assert len(scan([]).samples) == 0 and scan([]).shards == ()
    with pytest.raises(UserError, match=r"y/train-0\.tar: .*train-0\.tar has the same name; sample keys"):
        scan([paths[1], "y/train-0.tar"])


def test_remote_shards_give_the_same_index(tmp_path: Path, web: Web) -> None:
    contents = []
    for number in range(3):
        write(tmp_path / f"train-{number}.tar", odd_members())
        contents.append((tmp_path / f"train-{number}.tar").read_bytes())
    local = scan([str(tmp_path / f"train-{number}.tar") for number in range(3)])
    for prefix in (f"{web.url}/", f"pipe:cat {tmp_path}/"):
        remote = scan([f"{prefix}train-{number}.tar" for number in range(3)], workers=2)
        assert rows(remote) == rows(local) and remote.faults == local.faults
        assert [shard.sha256 for shard in remote.shards] == [hashlib.sha256(c).hexdigest() for c in contents]
        assert [shard.num_bytes for shard in remote.shards] == [len(content) for content in contents]
    hashed = scan([shard.url for shard in local.shards], checksums=True)
    assert rows(hashed) == rows(local)
    assert [shard.sha256 for shard in hashed.shards] == [shard.sha256 for shard in remote.shards]
    assert all(shard.sha256 is None for shard in local.shards)


def test_a_remote_shard_is_retried_as_a_whole(tmp_path: Path, web: Web) -> None:
    write(tmp_path / "a.tar", [member(f"{n}.jpg", bytes([n]) * 100_000) for n in range(40)])
    web.failures["/a.tar"] = ["cut", 503]
    index = scan_shard(f"{web.url}/a.tar")
    assert len(index.samples) == 40 and len(web.requests) == 3
    assert rows(index) == rows(scan_shard(str(tmp_path / "a.tar")))
    web.failures["/a.tar"] = ["cut", "cut", "cut"]
    with pytest.raises(UserError, match=r"a\.tar: cannot be read after 3 attempts \(the connection was cut"):
        scan([f"{web.url}/a.tar"])
    with pytest.raises(UserError, match=r"a\.tar: not a complete tar file"):
        scan([f"pipe:head -c 2000000 {tmp_path}/a.tar"])
    with pytest.raises(
        UserError, match=r"b\.tar: cannot be read after 3 attempts \(its command ended with st"
    ):
        scan([f"pipe:cat {tmp_path}/b.tar"])


@pytest.mark.parametrize(
    "members, faults",
    [
        ({"a.txt": b"x", "a.cls": b"0"}, [("a", "no-image", "only txt, cls; expected one of jpg, jpeg")]),
        ({"README.md": b"x"}, [("README", "no-image", "only md")]),
        ({"a.jpg": b"", "a.cls": b"cat"}, [("a", "label", ".cls holds b'cat', expected a class number")]),
        ({"a.jpg": b"", "a.cls": b"-1"}, [("a", "label", ".cls holds b'-1'")]),
        ({"a.jpg": b"", "a.cls": b"1_0"}, [("a", "label", ".cls holds b'1_0'")]),
        ({"a.jpg": b"", "a.cls": b""}, [("a", "label", ".cls holds b''")]),
        ({"a.jpg": b"", "a.cls": b"2147483648"}, [("a", "label", ".cls holds b'2147483648'")]),
        ({"a.jpg": b"", "a.cls": b"1" * 65}, [("a", "label", ".cls holds 65 bytes")]),
        (
            {"a.jpg": b"", "a.json": b"[]"},
            [("a", "label", ".json holds b'[]', expected {\"label\": class num")],
        ),
        ({"a.jpg": b"", "a.json": b'{"label": "x"}'}, [("a", "label", ".json holds")]),
        ({"a.jpg": b"", "a.json": b'{"label": true}'}, [("a", "label", ".json holds")]),
        ({"a.jpg": b"", "a.json": b'{"label": 1.0}'}, [("a", "label", ".json holds")]),
        ({"a.jpg": b"", "a.json": b'{"label": -1}'}, [("a", "label", ".json holds")]),
        ({"a.jpg": b"", "a.json": b"\xff"}, [("a", "label", ".json holds")]),
        ({"a.jpg": b"", "a.json": b"[" * 10**5}, [("a", "label", ".json holds")]),
        ({"a.jpg": b"", "a.json": b'{"label": ' + b"9" * 5000 + b"}"}, [("a", "label", ".json holds")]),
        ({"/a.jpg": b"", "/a.cls": b"1"}, [("/a", "path", "'/a.jpg' leaves the folder of the shard")]),
        ({"x/../a.jpg": b""}, [("x/../a", "path", "'x/../a.jpg' leaves")]),
    ],
)
def test_an_unusable_sample_is_a_fault(
    tmp_path: Path,
    write_tar: Callable[..., None],
    members: dict[str, bytes],
    faults: list[tuple[str, str, str]],
) -> None:
    write_tar(tmp_path / "t.tar", {"0.png": b"x", "0.cls": b" 3\n", **members, "z.webp": b"y"})
    index = scan_shard(str(tmp_path / "t.tar"))
    assert index.samples.keys == ["t.tar/0", "t.tar/z"] and index.samples.labels.tolist() == [3, -1]
    assert index.shards[0].num_samples == 2
    assert [(fault.key, fault.kind) for fault in index.faults] == [
        (f"t.tar/{key}", k) for key, k, _ in faults
    ]
    for fault, (_, _, reason) in zip(index.faults, faults, strict=True):
        assert fault.reason.startswith(reason) and len(fault.reason) < 120


def test_labels_from_json(tmp_path: Path, write_tar: Callable[..., None]) -> None:
    members = {
        "a.json": b'{"label": 7}',
        "b.json": b'{"caption": "x"}',
        "c.json": b'{"label": null}',
        "d.cls": b"1",
        "d.json": b'{"label": 2}',
        "e.json": b"\xef\xbb\xbf",  # not even asked for: the class is there
        "e.cls": b"2147483647",
    }
    write_tar(tmp_path / "t.tar", {**members, **{f"{key}.jpg": b"x" for key in "abcde"}})
    index = scan_shard(str(tmp_path / "t.tar"))
    assert index.samples.labels.tolist() == [7, -1, -1, 1, 2147483647] and index.faults == ()


def test_the_first_of_two_members_of_one_name_stays(tmp_path: Path) -> None:
    members = [
        member("a.jpg", b"first"),
        member("a.JPG", b"second"),
        member("a.cls", b"1"),
        member("a.cls", b"x"),
    ]
    write(tmp_path / "t.tar", members)
    index = scan_shard(str(tmp_path / "t.tar"))
    assert images(tmp_path / "t.tar", index) == {"t.tar/a": b"first"} and index.samples.labels.tolist() == [1]
    assert index.faults == (
        Fault("t.tar/a", "duplicate", "a second member is called 'a.JPG'"),
        Fault("t.tar/a", "duplicate", "a second member is called 'a.cls'"),
    )


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_a_link_is_no_image(tmp_path: Path, kind: bytes) -> None:
    write(tmp_path / "t.tar", [member("a.jpg", b"x"), member("b.jpg", type=kind, linkname="a.jpg")])
    index = scan_shard(str(tmp_path / "t.tar"))
    assert index.samples.keys == ["t.tar/a"]
    assert index.faults == (Fault("t.tar/b", "no-image", "'b.jpg' is a link or a device, not a file"),)


def test_a_name_that_is_not_utf8_comes_back(tmp_path: Path) -> None:
    write(tmp_path / "t.tar", [member("caf\udce9.jpg", b"x")], format=tarfile.GNU_FORMAT)
    assert list(scan_shard(str(tmp_path / "t.tar")).samples.keys) == ["t.tar/caf\udce9"]


def test_every_cut_is_noticed(tmp_path: Path, fill_shard: Callable[..., None]) -> None:
    path = tmp_path / "t.tar"
    fill_shard(path, 2)
    whole = path.read_bytes()
    for cut in [*range(0, len(whole.rstrip(b"\0")), 64), 511, 513]:
        path.write_bytes(whole[:cut])
        for checksum in (False, True):
            with pytest.raises(
                UserError, match=r"t\.tar: not a complete tar file \(.*byte \d+.*\); write or copy"
            ):
                scan_shard(str(path), checksum=checksum)


def test_a_hole_is_noticed(tmp_path: Path, fill_shard: Callable[..., None]) -> None:
    path = tmp_path / "t.tar"
    fill_shard(path, 3)
    content = bytearray(path.read_bytes())
    start = content.index(b"s001.png")
    content[start : start + 512] = bytes(512)
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"data behind the end-of-archive mark at byte {start}"):
        scan_shard(str(path))
    path.write_bytes(content[:start] + bytes(3 << 20))  # a download into a file of the final size
    with pytest.raises(UserError, match=rf"\(3145728 zero bytes from byte {start} on\)"):
        scan_shard(str(path))


@pytest.mark.parametrize("content", [b"", b"x", b"not a tar file" * 100, bytes(100)])
def test_what_is_no_tar_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "t.tar").write_bytes(content)
    with pytest.raises(UserError, match=r"t\.tar: not a complete tar file"):
        scan_shard(str(tmp_path / "t.tar"))


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"t\.tar: cannot be read after 3 attempts \(No such file or directory\)"
    ):
        scan_shard(str(tmp_path / "t.tar"))
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory\)"):
        scan_shard(str(tmp_path))


def test_real_shards(shared_data: Path) -> None:
    path = shared_data / "cifar10" / "test-0000.tar"
    index = scan_shard(str(path))
    contents = images(path, index)
    assert len(contents) == 2000 and index.faults == ()
    assert all(
        content.startswith(b"\xff\xd8") and content.endswith(b"\xff\xd9") for content in contents.values()
    )
    with tarfile.open(path) as tar:
        labels = [int(tar.extractfile(info).read()) for info in tar if info.name.endswith(".cls")]  # type: ignore[union-attr]
    assert index.samples.labels.tolist() == labels
