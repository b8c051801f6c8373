from __future__ import annotations

import random
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mlomae.data.shards.scan import scan_shard
from mlomae.data.shards.tar_members import FileSource, Member, StreamSource, iterate_members
from mlomae.errors import UserError
from tests.data.archives import damage, member, odd_members, with_checksum, write


def tarfile_members(path: Path) -> list[Member]:
    with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as tar:
        return [
            Member(info.name, info.offset_data, info.size, info.isreg() and not info.issparse(), info.isdir())
            for info in tar
        ]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("records", [None, {"comment": "x", "mtime": "1"}])
def test_members_are_those_of_tarfile(
    tmp_path: Path, format: int, stream: bool, records: dict[str, str] | None
) -> None:
    path = tmp_path / "a.tar"
    members = odd_members()
    if format == tarfile.USTAR_FORMAT:
        members = [(info, content) for info, content in members if info.name.isascii() and info.uid < 8**7]
        members = [(info, content) for info, content in members if len(info.name.rsplit("/", 1)[-1]) < 100]
    write(path, members, format=format, pax_headers=records)
    expected = tarfile_members(path)
    assert len(expected) == len(members)
    with path.open("rb") as file:
        source = StreamSource(file) if stream else FileSource(file)
        assert list(iterate_members(source)) == expected


def record(keyword: bytes, value: bytes) -> bytes:
    """A pax record; its length counts itself."""
    rest = b" %s=%s\n" % (keyword, value)
    return next(b"%d" % n + rest for n in range(100) if len(b"%d" % n + rest) == n)


@pytest.mark.parametrize(
    "records, accepted",
    [
        (record(b"size", b"700"), True),
        (record(b"size", b"5") + record(b"size", b"600"), True),
        (record(b"path", b"b.png/"), True),
        (record(b"path", b""), True),
        (record(b"path", b"x/b.png") + record(b"comment", b"a\n\nb"), True),
        (record(b"path", b"caf\xe9.png"), True),
        (record(b"hdrcharset", b"BINARY") + record(b"path", b"caf\xe9.png"), True),
        (record(b"path", b"b.png") + b"no record", True),
        (b"999 path=b.png\n", True),
        (b"0 path=x\n", False),
        (record(b"size", b"1" * 20), False),
        (record(b"size", b"-10240"), False),
        (record(b"size", b"2048"), False),
        (record(b"GNU.sparse.major", b"1") + record(b"GNU.sparse.minor", b"0"), False),
        (record(b"GNU.sparse.map", b"x,y"), False),
        (record(b"GNU.sparse.size", b"-512"), False),
    ],
)
@pytest.mark.parametrize("checksum", [False, True])
def test_pax_records(tmp_path: Path, records: bytes, accepted: bool, checksum: bool) -> None:
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    header[156:157] = b"x"
    header[124:136] = b"%011o\0" % len(records)
    content = with_checksum(header) + records.ljust(512, b"\0")
    image, _ = member("a.jpg", b"x" * 600)
    content += image.tobuf() + (b"x" * 600).ljust(1024, b"\0") + bytes(1024)
    (tmp_path / "t.tar").write_bytes(content)
    assert assert_harmless(tmp_path / "t.tar", checksum) == accepted


def test_a_folder_of_very_old_programs(tmp_path: Path) -> None:
    header = bytearray(tarfile.TarInfo("folder.jpg/").tobuf(tarfile.USTAR_FORMAT))
    header[156:157] = b"\0"
    (tmp_path / "t.tar").write_bytes(with_checksum(header) + bytes(1024))
    with (tmp_path / "t.tar").open("rb") as file:
        assert list(iterate_members(FileSource(file))) == [Member("folder.jpg", 512, 0, False, True)]
    assert assert_harmless(tmp_path / "t.tar")


@pytest.mark.parametrize("field", [b" " * 8, b"\0" * 8, b"1 1\0    ", b"0000000\0"])
def test_a_wrong_checksum_is_noticed(tmp_path: Path, write_tar: Callable[..., None], field: bytes) -> None:
    path = tmp_path / "t.tar"
    write_tar(path, {"a.jpg": b"x", "b.jpg": b"y"})
    content = bytearray(path.read_bytes())
    content[1024 + 148 : 1024 + 156] = field
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"neither a header nor an end-of-archive mark at byte 1024\)"):
        scan_shard(str(path))


def test_a_reading_error_is_no_damage(tmp_path: Path) -> None:
    class Failing(FileSource):
        def read(self, offset: int, size: int) -> bytes:
            if offset > 600:
                raise ConnectionError
            return super().read(offset, size)

    write(tmp_path / "t.tar", [member("y" * 150 + ".jpg", b"x")], format=tarfile.GNU_FORMAT)
    with (tmp_path / "t.tar").open("rb") as file, pytest.raises(ConnectionError):
        list(iterate_members(Failing(file)))


@pytest.mark.parametrize("kind", [b"x", b"g", b"L", b"K", b"S"])
def test_a_header_never_takes_much_memory(tmp_path: Path, kind: bytes) -> None:
    header = bytearray(tarfile.TarInfo("x").tobuf())
    header[156:157] = kind
    header[124:136] = b"\x80" + (1 << 40).to_bytes(11, "big")
    huge = with_checksum(header)
    header[124:136] = b"%011o\0" % 0
    for content in (huge + bytes(10240), with_checksum(header) * 3000 + b"x"):
        (tmp_path / "t.tar").write_bytes(content)
        with pytest.raises(UserError, match=r"not a complete tar file \(.*byte \d+"):
            scan_shard(str(tmp_path / "t.tar"))


def assert_harmless(path: Path, checksum: bool = False) -> bool:
    """Refused, or all images lie within the file and where tarfile finds them; says which."""
    try:
        index = scan_shard(str(path), checksum=checksum)
    except UserError as error:
        assert "t.tar: not a complete tar file" in str(error) and "\n" not in str(error)
        return False
    samples = index.samples
    assert index.shards[0].num_bytes == path.stat().st_size and len(set(samples.keys)) == len(samples)
    assert (samples.offsets >= 512).all() and (samples.sizes >= 0).all() and (samples.labels >= -1).all()
    assert (samples.offsets + samples.sizes <= path.stat().st_size).all()
    return True


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("checksum", [False, True])
def test_no_damage_leads_out_of_the_file(tmp_path: Path, format: int, checksum: bool) -> None:
    path = tmp_path / "t.tar"
    write(path, odd_members(), format=format)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        headers = [info.offset_data - 512 for info in tar] + [info.offset for info in tar]
    draw = random.Random(format)
    accepted = 0
    for _ in range(200):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 3)):
            damage(content, draw, headers)
        path.write_bytes(content)
        accepted += assert_harmless(path, checksum)
    assert 10 < accepted < 190  # both branches are reached
