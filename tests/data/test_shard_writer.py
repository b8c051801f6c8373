"""Shards of a data set: the same bytes whoever writes them and however often that is cut short."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlomae.data.sources import open_dataset
from mlomae.sections import DataConfig
from mlomae.sharding import pool, writer
from tests.data.made_shards import by_source, contents, create, members, refused


@pytest.fixture
def classes(tmp_path: Path, fill_folder: Callable[..., None]) -> Path:
    """30 images in two class folders."""
    fill_folder(tmp_path / "images" / "cat", 20)
    fill_folder(tmp_path / "images" / "dog", 10, first_seed=50)
    return tmp_path / "images"


def test_the_set_is_read_by_webdataset_and_as_a_data_set(tmp_path: Path, classes: Path) -> None:
    import webdataset

    out = tmp_path / "out"
    create(classes, out, per_shard=8)
    shards = sorted(str(path) for path in out.glob("*.tar"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves the shards open
        samples = list(webdataset.WebDataset(shards, shardshuffle=False).decode("pil"))
        gc.collect()
    assert len(samples) == 30
    for sample in samples:
        original = np.asarray(Image.open(classes / sample["json"]["source"]))
        assert np.array_equal(np.asarray(sample["png"]), original)
        assert sample["cls"] == sample["json"]["label"] == (sample["json"]["name"] == "dog")
    dataset = open_dataset(DataConfig(dataset="shards", path=out), 3)
    assert list(dataset.train.keys) == [f"{Path(s['__url__']).name}/{s['__key__']}" for s in samples]
    assert dataset.num_classes == 2 and dataset.train.labels is not None
    assert dataset.train.labels.tolist() == [sample["cls"] for sample in samples]
    assert [dataset.train.content(row) for row in range(30)] == [
        (classes / sample["json"]["source"]).read_bytes() for sample in samples
    ]


def test_the_number_of_workers_changes_no_byte(tmp_path: Path, classes: Path) -> None:
    (classes / "cat" / "bad.png").write_bytes(b"")
    (classes / "dog" / "bad.png").write_bytes(b"not an image")
    for workers in (1, 3):
        create(classes, tmp_path / f"out{workers}", per_shard=4, workers=workers, share=0.1)
    assert len(list((tmp_path / "out1").glob("*.tar"))) == 8
    assert contents(tmp_path / "out1") == contents(tmp_path / "out3")


def test_samples_are_shuffled_once_by_the_seed(tmp_path: Path, classes: Path) -> None:
    def order(seed: int | None) -> list[str]:
        out = tmp_path / f"out{seed}"
        create(classes, out, per_shard=7, seed=seed)
        found = members(*sorted(out.glob("*.tar")))
        return [json.loads(found[name])["source"] for name in found if name.endswith(".json")]

    kept = order(None)
    assert kept == sorted(kept)
    assert sorted(order(0)) == sorted(order(1)) == kept
    assert order(0) != order(1)
    # Classes mix: neither comes in one piece.
    assert sum(a[:3] != b[:3] for a, b in zip(order(0), order(0)[1:], strict=False)) > 5
    names = members(*sorted((tmp_path / "out0").glob("*.tar")))
    assert {name.partition(".")[0] for name in names} == {f"{number:08d}" for number in range(30)}


def test_bad_images_are_left_out_and_named(
    tmp_path: Path, classes: Path, encode: Callable[..., bytes]
) -> None:
    jpeg = encode(1, 64, 64, format="JPEG")
    bad = {"cat/empty.png": b"", "dog/text.jpg": b"<html>", "dog/cut.jpg": jpeg[: len(jpeg) // 2]}
    for name, content in bad.items():
        (classes / name).write_bytes(content)
    (classes / "cat" / "link.png").symlink_to("nowhere")
    out = tmp_path / "out"
    created = create(classes, out, per_shard=10, share=0.2)
    kinds = {
        "cat/empty.png": "empty",
        "cat/link.png": "unreadable",
        "dog/cut.jpg": "damaged",
        "dog/text.jpg": "not-an-image",
    }
    lines = [json.loads(line) for line in (out / "bad_samples.jsonl").read_text().splitlines()]
    assert [(line["key"], line["kind"]) for line in lines] == list(kinds.items())
    assert all(line.keys() == {"key", "kind", "reason"} and line["reason"] for line in lines)
    assert [fault.key for fault in created.faults] == list(kinds)
    assert len(by_source(out)) == len(created.parts["train"].samples) == 30
    # An image that only claims to be whole gets through where nothing is decoded.
    unchecked = create(classes, tmp_path / "unchecked", share=0.2, check=False)
    assert [fault.key for fault in unchecked.faults] == ["cat/empty.png", "cat/link.png", "dog/text.jpg"]
    assert by_source(tmp_path / "unchecked")["dog/cut.jpg"][1] == bad["dog/cut.jpg"]


def test_too_many_bad_images_stop_it_until_they_are_repaired(tmp_path: Path, classes: Path) -> None:
    out = tmp_path / "out"
    good = (classes / "cat" / "0.png").read_bytes()
    for number in (0, 1):
        (classes / "cat" / f"{number}.png").write_bytes(b"")
    (classes / "dog" / "2.png").write_bytes(b"x")
    message = refused(classes, out, per_shard=30, share=0.09)
    assert message.startswith("--max-bad-share: 3 of 30 images are bad so far (2 empty, 1 not-an-image)")
    assert len((out / "bad_samples.jsonl").read_text().splitlines()) == 3
    assert not (out / "train-index.json").exists()
    assert refused(classes, out, per_shard=30, share=0.09) == message
    (classes / "cat" / "0.png").write_bytes(good)
    assert len(create(classes, out, per_shard=30, share=0.09).parts["train"].samples) == 28
    assert len((out / "bad_samples.jsonl").read_text().splitlines()) == 2


def test_more_bad_images_may_be_allowed_afterwards(tmp_path: Path, classes: Path) -> None:
    (classes / "cat" / "0.png").write_bytes(b"")
    refused(classes, tmp_path / "out", per_shard=30)
    created = create(classes, tmp_path / "out", per_shard=30, share=0.5)
    assert created.num_written == 0 and len(created.parts["train"].samples) == 29


def test_a_shard_without_a_good_image_is_left_out(tmp_path: Path, fill_folder: Callable[..., None]) -> None:
    fill_folder(tmp_path / "images", 6)
    for number in (2, 3):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"")
    out = tmp_path / "out"
    index = create(tmp_path / "images", out, per_shard=2, seed=None, share=0.5).parts["train"]
    assert [Path(shard.url).name for shard in index.shards] == ["train-000000.tar", "train-000002.tar"]
    assert len(index.samples) == 4
    assert {path.name for path in out.glob("*.tar")} == {"train-000000.tar", "train-000002.tar"}
    assert create(tmp_path / "images", out, per_shard=2, seed=None, share=0.5).num_written == 0
    for number in range(6):
        (tmp_path / "images" / f"{number}.png").write_bytes(b"")
    assert "part train: all 6 images are bad" in refused(tmp_path / "images", tmp_path / "none", share=1.0)


@contextmanager
def started(source: Path, out: Path) -> Iterator[subprocess.Popen[str]]:
    """The command, once it has finished three shards."""
    argv = ["create", str(source), str(out), "--samples-per-shard", "1", "--workers", "2", "--format", "webp"]
    code = "import sys; from mlomae.cli import main; sys.exit(main(['shards', *sys.argv[1:]]))"
    process = subprocess.Popen([sys.executable, "-c", code, *argv], stderr=subprocess.PIPE, text=True)
    try:
        while len(list(out.glob(".*.done.json"))) < 3:
            assert process.poll() is None, process.communicate()
            time.sleep(0.005)
        yield process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A table of 24 images; each takes a twentieth of a second or more to be written as WebP."""
    for number in range(24):
        noise = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(noise).resize((400, 400)).save(tmp_path / f"{number}.png", compress_level=1)
    table = tmp_path / "table.csv"
    table.write_text("\n".join(["path,label", *(f"{number}.png,{number % 2}" for number in range(24))]))
    return table


def test_a_killed_run_is_continued(tmp_path: Path, large: Path) -> None:
    out, options = tmp_path / "out", {"per_shard": 1, "format": "webp", "workers": 2}
    with started(large, out) as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (out / "train-index.json").exists()
    records = [path.name for path in out.glob(".*.done.json")]
    whole = {name: (out / name).stat().st_mtime_ns for name in (r[1 : -len(".done.json")] for r in records)}
    # A shard that was cut after it was recorded is not taken for finished.
    cut = out / sorted(whole)[0]
    cut.write_bytes(cut.read_bytes()[:-512])
    del whole[cut.name]
    assert 1 <= len(whole) < 23
    (out / ".train-000023.tar.tmp").write_bytes(b"what a kill leaves")
    seen: list[tuple[int, ...]] = []
    created = create(large, out, report=lambda *counts: seen.append(counts), **options)
    assert {name: (out / name).stat().st_mtime_ns for name in whole} == whole
    assert created.num_written <= 24 - len(whole)
    assert seen[-1] == (created.num_written, created.num_written, 24, 24)
    create(large, tmp_path / "straight", **options)
    assert contents(out) == contents(tmp_path / "straight")
    assert {path.name for path in out.iterdir() if path.name.startswith(".")} == set()


def test_ctrl_c_leaves_complete_shards_only(tmp_path: Path, large: Path) -> None:
    out = tmp_path / "out"
    with started(large, out) as process:
        process.send_signal(signal.SIGINT)
        _, printed = process.communicate(timeout=20)
    assert process.returncode == 130
    assert printed == "mlomae: interrupted; the same command writes the shards that are missing\n"
    shards = {path.name for path in out.glob("*.tar")}
    assert 3 <= len(shards) < 24
    records = {f".{name}.done.json" for name in shards}
    assert {path.name for path in out.iterdir()} == shards | {"create.json"} | records
    for name in shards:
        assert len(members(out / name)) == 3


def test_a_worker_that_dies_is_reported(
    tmp_path: Path, classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "encode", lambda *arguments: os._exit(9))
    assert refused(classes, tmp_path / "out").startswith("a worker process was ended from outside")


def test_a_full_disk_is_reported_and_continued(
    tmp_path: Path, classes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def full(path: Path) -> Iterator[None]:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield

    with monkeypatch.context() as patch:
        patch.setattr(pool, "open_shard", full)
        message = refused(classes, tmp_path / "out")
    assert message == f"{tmp_path}/out/train-000000.tar: cannot be written (No space left on device)"
    assert len(create(classes, tmp_path / "out").parts["train"].samples) == 30


def test_a_complete_set_is_left_alone(tmp_path: Path, classes: Path) -> None:
    out = tmp_path / "out"
    (classes / "cat" / "bad.png").write_bytes(b"")
    first = create(classes, out, per_shard=10, share=0.1)
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    again = create(classes, out, per_shard=10, share=0.1)
    assert (first.num_written, again.num_written) == (31, 0)
    assert again.faults == first.faults and len(again.parts["train"].samples) == 30
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    (out / "train-000001.tar").unlink()
    message = refused(classes, out, per_shard=10, share=0.1)
    assert message.startswith(
        f"{out}/train-000001.tar: is missing or has changed since; delete {out}/train-index"
    )
    whole = contents(out)
    (out / "train-index.json").unlink()
    create(classes, out, per_shard=10, share=0.1)
    assert contents(out).items() >= whole.items() and (out / "train-000001.tar").exists()


@pytest.mark.parametrize(
    "options, difference",
    [
        ({"per_shard": 5}, "samples_per_shard 1000 there, 5 here"),
        ({"seed": 1}, "seed 0 there, 1 here"),
        ({"seed": None}, "seed 0 there, None here"),
        ({"resize": 8}, "resize None there, 8 here"),
        ({"format": "jpg"}, "format keep there, jpg here"),
        ({"quality": 80}, "quality 92 there, 80 here"),
        ({"check": False}, "check True there, False here"),
    ],
)
def test_other_options_are_refused(
    tmp_path: Path, classes: Path, options: dict[str, Any], difference: str
) -> None:
    create(classes, tmp_path / "out")
    before = contents(tmp_path / "out")
    message = refused(classes, tmp_path / "out", **options)
    assert message.startswith(f"{tmp_path}/out: holds shards that are made differently ({difference})")
    assert contents(tmp_path / "out") == before


def test_other_images_are_refused(tmp_path: Path, classes: Path, fill_folder: Callable[..., None]) -> None:
    create(classes, tmp_path / "out")
    fill_folder(classes / "mouse", 1, first_seed=90)
    message = refused(classes, tmp_path / "out")
    assert "made differently (another list of images; other classes); choose another folder" in message
    fill_folder(tmp_path / "others", 3)
    message = refused(tmp_path / "others", tmp_path / "out")
    assert f"(source {classes} there, {tmp_path}/others here; " in message


def test_folders_with_other_files_are_refused(tmp_path: Path, classes: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert refused(classes, out) == (
        f"{out}: holds other files, such as notes.txt, and no create.json; choose another folder"
    )
    assert contents(out) == {"notes.txt": b"mine"}
    (out / "notes.txt").unlink()
    create(classes, out)
    (out / "train-index.json").unlink()
    (out / "train-000099.tar").write_bytes(b"")
    assert refused(classes, out) == f"{out}: holds train-000099.tar, which is not of this set; remove it"
    (tmp_path / "file").write_text("")
    assert refused(classes, tmp_path / "file") == f"{tmp_path}/file: cannot be written (File exists)"


def test_one_process_writes_at_a_time(tmp_path: Path, classes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fcntl

    out = tmp_path / "out"
    out.mkdir()
    monkeypatch.setattr(writer, "PATIENCE", 0.2)
    with (out / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert refused(classes, out) == f"{out}: another process writes shards there; wait for it"
    create(classes, out)
