from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mlomae.data.dataset import Dataset
from mlomae.data.decoding import decode_image
from mlomae.data.faults import BadSample
from mlomae.data.shards.index import write_index
from mlomae.data.shards.scan import scan
from mlomae.data.shards.source import MAX_OPEN, ShardSource
from mlomae.data.sources import open_dataset
from mlomae.errors import UserError
from mlomae.sections import DataConfig


def open_shards(path: Path, in_chans: int = 3) -> Dataset:
    return open_dataset(DataConfig(dataset="shards", path=path), in_chans)


def test_samples_have_keys_labels_and_pixels(
    tmp_path: Path, encode: Callable[..., bytes], write_tar: Callable[..., None]
) -> None:
    contents = [encode(seed, 9, 6, format=format) for seed, format in enumerate(("PNG", "JPEG", "WEBP"))]
    write_tar(tmp_path / "train-0.tar", {"a.png": contents[0], "a.cls": b"2\n", "README": b"no suffix"})
    write_tar(
        tmp_path / "train-1.tar",
        {
            "sub/a.json": b'{"label": 0, "x": 1}',
            "sub/a.JPG": contents[1],
            "b.webp": contents[2],
            "b.cls": b"1",
        },
    )
    dataset = open_shards(tmp_path)
    assert dataset.train.keys == ["train-0.tar/a", "train-1.tar/sub/a", "train-1.tar/b"]
    assert dataset.train.labels is not None and dataset.train.labels.tolist() == [2, 0, 1]
    assert dataset.num_classes == 3 and dataset.open_test is None
    for index, content in enumerate(contents):
        assert dataset.train.content(index) == content


def test_class_names_count_the_classes(tmp_path: Path, fill_shard: Callable[..., None]) -> None:
    fill_shard(tmp_path / "train-0.tar", 4)
    (tmp_path / "classes.json").write_text('["a", "b", "c"]')
    dataset = open_shards(tmp_path)
    assert dataset.num_classes == 3 and dataset.class_names == ("a", "b", "c")


def test_shards_without_labels(
    tmp_path: Path, encode: Callable[..., bytes], write_tar: Callable[..., None]
) -> None:
    write_tar(
        tmp_path / "train-0.tar", {"a.png": encode(0), "a.json": b'{"caption": "x"}', "b.png": encode(1)}
    )
    dataset = open_shards(tmp_path)
    assert dataset.train.labels is None and dataset.num_classes is None


@pytest.mark.parametrize("part", ["test", "val"])
def test_the_test_part_is_opened_only_when_asked_for(
    tmp_path: Path, fill_shard: Callable[..., None], part: str
) -> None:
    fill_shard(tmp_path / "train-0.tar", 4)
    (tmp_path / f"{part}-0.tar").write_bytes(b"not a tar file")
    dataset = open_shards(tmp_path)
    assert dataset.open_test is not None
    with pytest.raises(UserError, match=rf"{part}-0\.tar: not a complete tar file"):
        dataset.open_test()
    fill_shard(tmp_path / f"{part}-0.tar", 6, first_seed=50)
    assert len(dataset.open_test()) == 6


def test_a_pickled_copy_reads_the_same(tmp_path: Path, fill_shard: Callable[..., None]) -> None:
    fill_shard(tmp_path / "train-0.tar", 3)
    source = open_shards(tmp_path).train
    content = source.content(2)
    assert pickle.loads(pickle.dumps(source)).content(2) == content


def test_many_shards_keep_few_descriptors(tmp_path: Path, fill_shard: Callable[..., None]) -> None:
    names = [f"train-{number:03d}.tar" for number in range(MAX_OPEN + 5)]
    for number, name in enumerate(names):
        fill_shard(tmp_path / name, 1, first_seed=number)
    source = open_shards(tmp_path).train
    assert len(source) == len(names)
    before = len(list(Path("/proc/self/fd").iterdir()))
    contents = [source.content(index) for index in range(len(source))]
    assert len(list(Path("/proc/self/fd").iterdir())) - before == MAX_OPEN
    assert source.content(0) == contents[0]
    del source
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_every_cut_of_a_shard_is_noticed(tmp_path: Path, fill_shard: Callable[..., None]) -> None:
    shard = tmp_path / "train-0.tar"
    fill_shard(shard, 4)
    whole = shard.read_bytes()
    content_end = len(whole.rstrip(b"\0"))
    for cut in range(0, content_end, 512):  # also exactly between two members
        shard.write_bytes(whole[:cut])
        with pytest.raises(UserError, match=r"train-0\.tar: not a complete tar file"):
            open_shards(tmp_path)


def test_a_damaged_header_is_noticed(tmp_path: Path, fill_shard: Callable[..., None]) -> None:
    shard = tmp_path / "train-0.tar"
    fill_shard(shard, 4)
    content = bytearray(shard.read_bytes())
    start = content.index(b"s002.png")
    content[start : start + 100] = b"x" * 100
    shard.write_bytes(content)
    with pytest.raises(UserError, match=rf"train-0\.tar: not a complete tar file .*byte {start}"):
        open_shards(tmp_path)


def test_bad_members_are_left_out_and_named(
    tmp_path: Path, encode: Callable[..., bytes], write_tar: Callable[..., None]
) -> None:
    members = {
        "a.txt": b"x", "a.cls": b"0",
        "b.png": encode(1), "b.cls": b"cat",
        "c.png": encode(2), "c.json": b'{"label": "x"}',
        "d.png": encode(3), "d.PNG": encode(4),
        "e.png": encode(5),
    }  # fmt: skip
    write_tar(tmp_path / "train-0.tar", members)
    source = open_shards(tmp_path).train
    assert isinstance(source, ShardSource)
    assert source.keys == ["train-0.tar/d", "train-0.tar/e"] and source.labels is None
    assert source.content(0) == members["d.png"]
    assert {(fault.key.partition("/")[2], fault.kind) for fault in source.index.faults} == {
        ("a", "no-image"), ("b", "label"), ("c", "label"), ("d", "duplicate"),
    }  # fmt: skip


def test_shards_without_samples(tmp_path: Path, write_tar: Callable[..., None]) -> None:
    write_tar(tmp_path / "train-0.tar", {"README": b"x"})
    with pytest.raises(UserError, match=r"data\.path: no samples in .*; expected images"):
        open_shards(tmp_path)


def test_a_shard_that_changes_under_way_gives_no_wrong_sample(
    tmp_path: Path, fill_shard: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mlomae.data.urls.DELAYS", (0.0,))
    shard = tmp_path / "train-0.tar"
    fill_shard(shard, 4)
    source = open_shards(tmp_path).train
    whole = shard.read_bytes()
    shard.write_bytes(whole.replace(b"s001.png", b"t001.png"))
    source.content(0)
    with pytest.raises(BadSample) as caught:
        source.content(1)
    assert caught.value.kind == "misplaced"
    os.truncate(shard, len(whole) // 2)
    with pytest.raises(UserError, match=r"train-0\.tar: cannot be read after 2 attempts \(it ends at byte"):
        source.content(3)


def test_an_index_beside_the_shards_is_taken_and_checked(
    tmp_path: Path, fill_shard: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = [tmp_path / f"train-{number}.tar" for number in range(3)]
    for number, shard in enumerate(shards):
        fill_shard(shard, 3 + number, first_seed=10 * number)
    scanned = open_shards(tmp_path).train
    write_index(tmp_path / "train-index.json", scan([str(shard) for shard in shards]))
    monkeypatch.delattr("mlomae.data.shards.sets.scan")
    indexed = open_shards(tmp_path).train
    assert indexed.keys == scanned.keys
    assert [indexed.content(n) for n in range(12)] == [scanned.content(n) for n in range(12)]
    some = open_shards(Path(f"{tmp_path}/train-{{1..2}}.tar")).train
    assert some.keys == scanned.keys[3:]
    assert [some.content(n) for n in range(9)] == [scanned.content(n) for n in range(3, 12)]
    os.truncate(shards[1], 4096)
    with pytest.raises(UserError, match=r"train-1\.tar: has 4096 bytes, but its index says \d+; copy"):
        open_shards(tmp_path)
    shards[1].unlink()
    with pytest.raises(UserError, match=r"train-1\.tar: cannot be read \(No such file"):
        open_shards(Path(f"{tmp_path}/train-index.json"))


@pytest.mark.parametrize("listed", [4, 5])
def test_counts_are_compared_with_timms_listing(
    tmp_path: Path, fill_shard: Callable[..., None], listed: int
) -> None:
    fill_shard(tmp_path / "train-0.tar", 4)
    split = {"filenames": ["train-0.tar"], "shard_lengths": [listed], "num_samples": listed}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    if listed == 4:
        assert len(open_shards(tmp_path).train) == 4
    else:
        with pytest.raises(UserError, match=r"train-0\.tar: holds 4 samples, but timm's listing says 5"):
            open_shards(tmp_path)


def test_timm_counts_bad_samples_too(
    tmp_path: Path, encode: Callable[..., bytes], write_tar: Callable[..., None]
) -> None:
    good = {f"{key}.{kind}": content for key in "ab" for kind, content in (("png", encode(1)), ("cls", b"0"))}
    write_tar(tmp_path / "train-0.tar", {**good, "c.png": encode(2), "c.cls": b"cat", "d.cls": b"1"})
    split = {"filenames": ["train-0.tar"], "shard_lengths": [4], "num_samples": 4}
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": split}}))
    assert len(open_shards(tmp_path).train) == 2


def test_parts_that_number_their_classes_differently_are_refused(
    tmp_path: Path, fill_shard: Callable[..., None]
) -> None:
    for part, classes in (("train", ("ant", "bee")), ("test", ("bee", "cat"))):
        fill_shard(tmp_path / f"{part}-0.tar", 4)
        index = scan([str(tmp_path / f"{part}-0.tar")])
        write_index(tmp_path / f"{part}-index.json", replace(index, classes=classes))
    dataset = open_shards(tmp_path)
    assert dataset.open_test is not None
    with pytest.raises(UserError, match=r"^data\.test_path: .* numbers its classes in another way"):
        dataset.open_test()


def test_a_test_part_without_samples(
    tmp_path: Path, fill_shard: Callable[..., None], write_tar: Callable[..., None]
) -> None:
    fill_shard(tmp_path / "train-0.tar", 4)
    write_tar(tmp_path / "test-0.tar", {"a.cls": b"0"})
    dataset = open_shards(tmp_path)
    assert dataset.open_test is not None
    with pytest.raises(UserError, match=r"^data\.test_path: no samples in .*test-0\.tar"):
        dataset.open_test()


def test_a_pattern_with_a_test_pattern(tmp_path: Path, fill_shard: Callable[..., None]) -> None:
    fill_shard(tmp_path / "a-00.tar", 4)
    fill_shard(tmp_path / "a-01.tar", 4, first_seed=10)
    fill_shard(tmp_path / "b-00.tar", 2, first_seed=20)
    data = DataConfig(dataset="shards", path=f"{tmp_path}/a-{{00..01}}.tar", test_path=f"{tmp_path}/b-*.tar")
    dataset = open_dataset(data, 3)
    assert len(dataset.train) == 8 and dataset.open_test is not None and len(dataset.open_test()) == 2
    assert open_dataset(DataConfig(dataset="shards", path=data.path), 3).open_test is None


def test_labels_beyond_the_known_classes(tmp_path: Path, fill_shard: Callable[..., None]) -> None:
    fill_shard(tmp_path / "train-0.tar", 1)
    fill_shard(tmp_path / "test-0.tar", 2, first_seed=9)
    dataset = open_shards(tmp_path)
    assert dataset.open_test is not None
    with pytest.raises(UserError, match=r"test-0\.tar: found label 1, expected 0 to 0"):
        dataset.open_test()
    (tmp_path / "classes.json").write_text("{}")
    with pytest.raises(UserError, match=r"classes\.json: not a JSON list of class names"):
        open_shards(tmp_path)


def test_unlabelled_test_shards_of_labelled_training(
    tmp_path: Path,
    fill_shard: Callable[..., None],
    encode: Callable[..., bytes],
    write_tar: Callable[..., None],
) -> None:
    fill_shard(tmp_path / "train-0.tar", 2)
    write_tar(tmp_path / "test-0.tar", {"a.png": encode(7)})
    dataset = open_shards(tmp_path)
    assert dataset.open_test is not None
    with pytest.raises(UserError, match=r"test-0\.tar/a: has no label, but test samples need one"):
        dataset.open_test()


def test_a_folder_without_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(f"data.path: no train-*.tar in {tmp_path}")):
        open_shards(tmp_path)


def test_real_shards(tmp_path: Path, shared_data: Path) -> None:
    for name in ("train-0000.tar", "train-0024.tar", "test-0000.tar", "classes.json"):
        (tmp_path / name).symlink_to(shared_data / "cifar10" / name)
    dataset = open_shards(tmp_path)
    assert len(dataset.train) == 4000 and len(set(dataset.train.keys)) == 4000
    assert dataset.num_classes == 10 and dataset.train.labels is not None
    assert dataset.train.labels.bincount().min() > 300
    assert dataset.open_test is not None
    assert len(dataset.open_test()) == 2000
    contents = map(dataset.train.content, range(0, 4000, 20))
    images = torch.stack([decode_image(content, 3) for content in contents])
    assert images.shape == (200, 3, 32, 32)
    # The file-wide statistics of CIFAR-10, which a wrong channel order or offset would miss.
    assert torch.allclose(
        images.float().mean((0, 2, 3)) / 255, torch.tensor([0.491, 0.482, 0.447]), atol=0.03
    )
