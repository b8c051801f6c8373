"""Whatever is wrong with a set of shards is found, and nothing else is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlomae.data import urls
from mlomae.data.shards.index import read_index
from mlomae.errors import UserError
from mlomae.sharding.indexing import index_shards
from mlomae.sharding.report import Verification, verify
from mlomae.sharding.statistics import Spread, measure
from tests.data.made_shards import create
from tests.data.web import serve


@pytest.fixture
def shards(tmp_path: Path, fill_folder: Callable[..., None]) -> Path:
    """Three shards of four images."""
    fill_folder(tmp_path / "images" / "cat", 8)
    fill_folder(tmp_path / "images" / "dog", 4, first_seed=50)
    create(tmp_path / "images", tmp_path / "shards", per_shard=4)
    return tmp_path / "shards"


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(urls, "DELAYS", (0.0,))


def check(where: Path | str, quick: bool = False, decode: bool = False) -> Verification:
    return verify(str(where), quick, decode, 2, lambda done, total: None)


def problems(where: Path | str, quick: bool = False, decode: bool = False) -> list[tuple[str, str, str]]:
    return [(one.shard, one.found, one.expected) for one in check(where, quick, decode).problems]


def replace_bytes(path: Path, old: bytes, new: bytes) -> None:
    content = path.read_bytes()
    assert len(old) == len(new) and old in content
    path.write_bytes(content.replace(old, new, 1))


def index(pattern: Path | str, out: Path, **options: bool | str | None) -> list[Path]:
    settings = {"part": None, "classes": None, "checksums": False, **options}
    return list(index_shards(str(pattern), out, workers=2, **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("quick", [False, True])
def test_a_set_as_it_was_made(shards: Path, quick: bool) -> None:
    num_bytes = sum(path.stat().st_size for path in shards.glob("*.tar"))
    expected = Verification(3, 12, num_bytes, 0, (), ())
    for where in (shards, shards / "train-index.json", shards / "train-*.tar"):
        assert check(where, quick, decode=True) == expected
    one = check(shards / "train-{000000..000001}.tar", quick)
    assert (one.shards, one.samples, one.problems) == (2, 8, ())


@pytest.mark.parametrize("quick", [False, True])
def test_every_cut_is_found(shards: Path, quick: bool) -> None:
    shard = shards / "train-000001.tar"
    whole = shard.read_bytes()
    for cut in {*range(0, len(whole), 512), *range(7, len(whole), 999), len(whole) - 1}:
        shard.write_bytes(whole[:cut])
        found = problems(shards, quick)
        assert (shard.name, f"{cut} bytes", f"{len(whole)} bytes by the index") in found, cut
        assert {name for name, _, _ in found} == {shard.name}


def test_a_cut_is_found_without_an_index(shards: Path) -> None:
    for path in shards.glob("train-index.*"):
        path.unlink()
    result = check(shards)
    assert (result.unindexed, result.problems) == (("train",), ())
    shard = shards / "train-000002.tar"
    whole = shard.read_bytes()
    for cut in range(0, len(whole.rstrip(b"\0")), 512):
        shard.write_bytes(whole[:cut])
        ((name, found, expected),) = problems(shards)
        assert (name, expected) == (shard.name, "a complete shard") and "not a complete tar file" in found


def test_missing_and_other_shards(shards: Path) -> None:
    shutil.copy(shards / "train-000000.tar", shards / "train-000007.tar")
    (shards / "train-000002.tar").unlink()
    expected = [
        ("train-000002.tar", "no such file", "the shard, which the index names"),
        ("train-000007.tar", "not in the index", "only shards that the index names"),
    ]
    for where in (shards, shards / "train-index.json"):
        assert problems(where) == problems(where, quick=True) == expected
    # A pattern may name some of the shards.
    assert problems(shards / "train-00000[01].tar") == []
    assert problems(shards / "train-{000001..000002}.tar") == expected[:1]


def test_swapped_shards(shards: Path) -> None:
    first, second = shards / "train-000000.tar", shards / "train-000001.tar"
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    assert {(name, found) for name, found, _ in problems(shards, quick=True)} >= {
        (path.name, "4 samples of other keys, places or labels") for path in (first, second)
    }


def test_one_other_byte(shards: Path) -> None:
    shard = shards / "train-000001.tar"
    replace_bytes(shard, b"IHDR", b"IHDX")
    ((name, found, expected),) = problems(shards)
    assert (name, found[:8], expected[:8], expected[-13:]) == (
        shard.name,
        "SHA-256 ",
        "SHA-256 ",
        " by the index",
    )
    assert problems(shards, quick=True) == []
    (problem,) = check(shards, quick=True, decode=True).problems
    assert problem.expected == "an image that decodes" and problem.found.endswith(" (damaged)")
    assert problem.found.startswith("train-000001.tar/0000000")


def test_other_labels_are_found_from_headers(shards: Path) -> None:
    shard = shards / "train-000000.tar"
    content = shard.read_bytes()
    start = content.index(b".cls") // 512 * 512 + 512
    shard.write_bytes(content[:start] + b"7" + content[start + 1 :])
    assert problems(shards, quick=True) == [
        (shard.name, "1 samples of other keys, places or labels", "the samples of the index")
    ]


def test_other_numbers_of_samples(shards: Path, fill_shard: Callable[..., None]) -> None:
    fill_shard(shards / "train-000001.tar", 3)
    found = problems(shards)
    assert ("train-000001.tar", "3 samples", "4 samples by the index") in found


def test_timms_listing(shards: Path) -> None:
    names = [f"train-{number:06d}.tar" for number in range(4)]

    def write(lengths: list[int], count: int) -> None:
        split = {"filenames": names[:count], "shard_lengths": lengths}
        (shards / "_info.json").write_text(json.dumps({"splits": {"train": split}}))

    write([4, 4, 4], 3)
    assert problems(shards) == []
    write([4, 5, 4, 4], 4)
    assert problems(shards) == [
        ("train-000001.tar", "4 samples", "5 samples by _info.json"),
        ("train-000001.tar", "5 samples by _info.json", "4 samples by the index"),
        ("train-000003.tar", "no such file", "the shard, which _info.json names"),
    ]
    write([4, 4], 2)
    assert problems(shards) == [("train-000002.tar", "not in _info.json", "every shard in it")]
    (shards / "_info.json").write_text("[]")
    ((name, _, expected),) = problems(shards)
    assert (name, expected) == ("_info.json", "a readable listing")


@pytest.mark.parametrize("name", ["train-index.json", "train-index.npz"])
def test_a_damaged_index(shards: Path, name: str) -> None:
    content = (shards / name).read_bytes()
    (shards / name).write_bytes(content[: len(content) // 2])
    for where in (shards, shards / "train-index.json", shards / "train-*.tar"):
        (problem,) = check(where).problems
        assert (problem.shard, problem.expected) == ("train-index.json", "a readable index")
        assert name in problem.found
    with pytest.raises(UserError, match=name):
        measure(str(shards))


def test_unusable_samples(
    tmp_path: Path, encode: Callable[..., bytes], write_tar: Callable[..., None]
) -> None:
    contents = {"a.png": encode(0), "b.cls": b"1", "c.png": encode(1), "c.cls": b"x", "d.png": b"no image"}
    write_tar(tmp_path / "train-0.tar", contents)
    found = check(tmp_path)
    assert [(one.found.partition(":")[0], one.found.rpartition(" ")[2]) for one in found.problems] == [
        ("train-0.tar/b", "(no-image)"),
        ("train-0.tar/c", "(label)"),
    ]
    assert (found.samples, found.known_faults) == (2, 0)
    # An index may know of them.
    index(tmp_path, tmp_path)
    found = check(tmp_path)
    assert (found.samples, found.known_faults, found.problems) == (2, 2, ())
    (problem,) = check(tmp_path, decode=True).problems
    assert problem.found.startswith("train-0.tar/d: ") and problem.found.endswith("(not-an-image)")


def test_shards_that_are_no_files(tmp_path: Path, shards: Path) -> None:
    with serve(shards) as web:
        for where in (f"{web.url}/train-index.json", f"{web.url}/train-{{000000..000002}}.tar"):
            result = check(where, decode=True)
            assert (result.samples, result.unindexed, result.problems) == (12, (), ())
    replace_bytes(shards / "train-000001.tar", b"IHDR", b"IHDX")
    ((name, found, _),) = problems(f"pipe:cat {shards}/train-{{000000..000002}}.tar")
    assert (name, found[:8]) == ("train-000001.tar", "SHA-256 ")
    (shards / "train-000001.tar").unlink()
    ((name, _, expected),) = problems(f"pipe:cat {shards}/train-{{000000..000002}}.tar")
    assert (name, expected) == ("train-000001.tar", "a complete shard")


def test_nothing_to_look_at(tmp_path: Path) -> None:
    for look in (check, lambda where: measure(str(where))):
        with pytest.raises(UserError, match=r"no shards and no index; expected train-\*\.tar"):
            look(tmp_path)
        with pytest.raises(UserError, match="no file matches"):
            look(tmp_path / "train-*.tar")


def test_every_image_is_counted(
    tmp_path: Path, encode: Callable[..., bytes], write_tar: Callable[..., None]
) -> None:
    images = [encode(0, 8, 30), encode(1, 10, 20, format="JPEG"), encode(2, 12, 40), encode(3, 9, 9)]
    train = {f"{number}.png": content for number, content in enumerate(images[:3])}
    train |= {"0.cls": b"2", "1.cls": b"0", "3.png": b"text"}
    write_tar(tmp_path / "train-0.tar", train)
    write_tar(tmp_path / "test-0.tar", {"9.webp": encode(3, 9, 9, format="WEBP"), "9.cls": b"1"})
    (tmp_path / "classes.json").write_text('["cat", "dog", "mouse"]')
    (part, other), split = measure(str(tmp_path))
    assert (part.part, part.shards, part.samples, part.labelled) == ("train", 1, 4, 2)
    assert part.num_bytes == (tmp_path / "train-0.tar").stat().st_size
    assert part.classes == {"cat": 1, "dog": 0, "mouse": 1}
    assert (part.kinds, part.sampled) == ({"png": 2, "jpg": 1, "other": 1}, 3)
    assert (part.width, part.height) == (Spread(20, 30, 40), Spread(8, 10, 12))
    sizes = sorted(map(len, images[:3]))
    assert part.image_bytes == Spread(4, (sizes[0] + sizes[1]) / 2, sizes[2])
    assert (other.part, other.samples, other.kinds) == ("test", 1, {"webp": 1})
    assert split == "data.heldout_fraction: 0.2 leaves no held-out image of 2 labelled ones (of 4); " + (
        "raise it or label more images"
    )


def test_the_split_of_a_run(
    tmp_path: Path, fill_shard: Callable[..., None], write_tar: Callable[..., None]
) -> None:
    fill_shard(tmp_path / "train-0.tar", 200)
    (_,), split = measure(str(tmp_path / "train-*.tar"))
    assert not isinstance(split, str) and split is not None
    assert sum(split.sizes.values()) == 200 and split.sizes.keys() == {"train", "heldout", "test"}
    assert 20 < split.sizes["heldout"] < 50 and split.without_heldout == 0
    fill_shard(tmp_path / "val-0.tar", 3)
    _, split = measure(str(tmp_path))
    assert not isinstance(split, str) and split is not None and split.sizes.keys() == {"train", "heldout"}
    shutil.copy(tmp_path / "val-0.tar", tmp_path / "other-0.tar")
    assert measure(str(tmp_path / "other-*.tar"))[1] is None


def test_many_images_are_sampled_evenly(
    tmp_path: Path,
    encode: Callable[..., bytes],
    write_tar: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contents = {f"{number:03d}.png": encode(0, 8 + number // 30, 8) for number in range(60)}
    write_tar(tmp_path / "train-0.tar", contents)
    monkeypatch.setattr("mlomae.sharding.statistics.SAMPLED", 40)
    (part,), _ = measure(str(tmp_path))
    assert (part.sampled, part.samples, part.height) == (40, 60, Spread(8, 8.5, 9))


def test_shards_of_others_are_indexed(tmp_path: Path, fill_shard: Callable[..., None]) -> None:
    for name in ("train-0.tar", "train-1.tar", "val_0.tar"):
        fill_shard(tmp_path / "shards" / name, 3)
    (tmp_path / "shards" / "classes.json").write_text('["a", "b"]')
    paths = index(tmp_path / "shards", tmp_path / "shards")
    assert [path.name for path in paths] == ["train-index.json", "val-index.json"]
    train = read_index(str(paths[0]))
    assert train.classes == ("a", "b") and len(train.samples) == 6
    assert [shard.sha256 for shard in train.shards] == [None, None]
    assert check(tmp_path / "shards").problems == ()
    (path,) = index(tmp_path / "shards/train-1.tar", tmp_path / "out", part="test", checksums=True)
    assert path == tmp_path / "out" / "test-index.json"
    (shard,) = read_index(str(path)).shards
    assert shard.url == str(tmp_path / "shards" / "train-1.tar") and len(shard.sha256 or "") == 64
    assert check(path).problems == ()
    (tmp_path / "names.json").write_text('["x", "y"]')
    (path,) = index(
        f"pipe:cat {tmp_path}/shards/train-1.tar", tmp_path / "out", classes=str(tmp_path / "names.json")
    )
    assert read_index(str(path)).classes == ("x", "y")


def test_shards_that_cannot_be_indexed(tmp_path: Path, write_tar: Callable[..., None]) -> None:
    write_tar(tmp_path / "train-0.tar", {"a.txt": b""})
    write_tar(tmp_path / "7.tar", {"a.txt": b""})
    for pattern, message in (
        (tmp_path / "train-0.tar", r"train-0\.tar: no samples in it and its siblings"),
        (tmp_path / "7.tar", r"7\.tar: its name tells no part; give --part"),
        (tmp_path / "no*.tar", "no file matches"),
    ):
        with pytest.raises(UserError, match=message):
            index(pattern, tmp_path)
    (tmp_path / "classes.json").write_text("[1]")
    with pytest.raises(UserError, match=r"classes\.json: not a JSON list of class names"):
        index(tmp_path / "train-0.tar", tmp_path)
    assert not list(tmp_path.glob("*-index.*"))
