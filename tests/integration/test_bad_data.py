"""Runs on damaged data: a few bad samples are passed over and named, many stop the run with the reason."""

from __future__ import annotations

import contextlib
import io
import json
import multiprocessing
import re
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlomae.cli import main
from mlomae.data.batches import Batch
from mlomae.data.faults import Kind
from mlomae.data.stream import Stream
from tests.distributed.ranks import run_ranks
from tests.integration.bad_shards import (
    HIDDEN,
    MORE_WAYS,
    WAYS,
    encode,
    pixels,
    write_shards,
)
from tests.integration.tiny import read_metrics, read_result, train_and_die, without_pictures, write_recipe

SHARDS, SAMPLES = 10, 100
TOTAL = SHARDS * SAMPLES
BATCH = 32
# More than an epoch of the 640 or so training images.
FIELDS: dict[str, Any] = {
    "iterations": 12,
    "checkpoint_every": 5,
    "model.img_size": 16,
    "model.patch_size": 4,
    "model.in_chans": 3,
    "data.dataset": "shards",
    "data.resident": "never",
    "data.shuffle_buffer": 4 * BATCH,
    "pretrain.batch_size": BATCH,
    "head.batch_size": BATCH,
    "mask.batch_size": 16,
}
MODES: dict[str, dict[str, Any]] = {
    "random": {"data.access": "random"},
    "random, workers": {"data.access": "random", "data.workers": 2},
    "sequential": {"data.access": "sequential"},
    "sequential, workers": {"data.access": "sequential", "data.workers": 2},
    "resident": {"data.resident": "always"},
}

Kinds = dict[str, Kind]


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)
    monkeypatch.setattr("mlomae.evaluate.PROBE_ITERATIONS", 2)  # nobody looks at the accuracy


@pytest.fixture(scope="module")
def ten(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Kinds]:
    """A thousand samples, of which ten are bad, each in its way."""
    folder = tmp_path_factory.mktemp("ten")
    bad = {number * SAMPLES + number + 3: way for number, way in enumerate(WAYS)}
    return folder, write_shards(folder, SHARDS, SAMPLES, bad)


@pytest.fixture(scope="module")
def fifty(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Kinds]:
    """A thousand samples, of which fifty are bad in ways that no header tells."""
    folder = tmp_path_factory.mktemp("fifty")
    ways = [way for way, (kind, _) in {**WAYS, **MORE_WAYS}.items() if kind in HIDDEN]
    bad = {20 * number + number % 7: ways[number % len(ways)] for number in range(50)}
    return folder, write_shards(folder, SHARDS, SAMPLES, bad)


def arguments(tmp_path: Path, data: Path, fields: dict[str, Any]) -> list[str]:
    recipe = write_recipe(tmp_path / "tiny.yaml", {**FIELDS, "data.path": str(data), **fields})
    return ["train", "--config", str(recipe), "--run-dir", str(tmp_path / "run")]


def named(tmp_path: Path) -> list[tuple[str, str]]:
    """(key, kind) of the lines of bad_samples.jsonl."""
    lines = (tmp_path / "run" / "bad_samples.jsonl").read_bytes().split(b"\n")
    assert lines.pop() == b""
    entries = [json.loads(line) for line in lines]
    assert all(entry.keys() == {"key", "kind", "reason"} and entry["reason"] for entry in entries)
    return [(entry["key"], entry["kind"]) for entry in entries]


def assert_names_all(tmp_path: Path, kinds: Kinds) -> None:
    assert sorted(named(tmp_path)) == sorted(kinds.items())
    assert read_result(tmp_path / "run")["bad_samples"] == len(kinds)


@pytest.mark.parametrize("mode", MODES)
def test_one_percent_is_passed_over_and_named(
    mode: str, ten: tuple[Path, Kinds], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, kinds = ten
    sizes: Counter[int] = Counter()
    following = Stream.next

    def counted(self: Stream) -> Batch:
        batch = following(self)
        assert batch.labels is not None
        assert len(batch.labels) == len(batch.images)
        sizes[len(batch.images)] += 1
        return batch

    monkeypatch.setattr(Stream, "next", counted)

    assert main(arguments(tmp_path, folder, MODES[mode])) == 0

    assert len(kinds) == 10
    assert_names_all(tmp_path, kinds)
    assert sizes == {BATCH: 3 * FIELDS["iterations"], 16: FIELDS["iterations"]}, "a batch was not full"
    counts = [row["bad_samples"] for row in read_metrics(tmp_path / "run")]
    assert counts == sorted(counts)
    # From the headers three are known. One is in the test set, which only the evaluation reads.
    assert 3 <= counts[0] <= counts[-1] == 9


@pytest.mark.parametrize("mode", MODES)
def test_five_percent_stop_with_the_reason(
    mode: str, fifty: tuple[Path, Kinds], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, kinds = fifty

    assert main(arguments(tmp_path, folder, MODES[mode])) == 2

    count = stop_count(capsys.readouterr().err, kinds, 0.01)
    assert 11 <= count < 50
    if mode == "resident":  # the sets are read before the run begins
        assert not (tmp_path / "run").exists()
    else:
        assert len(named(tmp_path)) == count
        assert set(named(tmp_path)) <= set(kinds.items())


def stop_count(errors: str, kinds: Kinds, limit: float) -> int:
    """Bad samples by the one line that stopped a run."""
    (line,) = errors.splitlines()
    match = re.search(
        r"data\.max_bad_share: (\d+) of 1000 samples are bad \((.+?)\), more than the (\S+) ", line
    )
    assert match is not None, line
    by_kind = [part.split(" ") for part in match[2].split(", ")]
    assert {kind for _, kind in by_kind} <= set(kinds.values())
    assert sum(int(count) for count, _ in by_kind) == int(match[1])
    assert float(match[3]) == limit
    assert any(key in line for key in kinds)
    return int(match[1])


def test_what_headers_tell_stops_before_the_run_begins(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ways = [way for way, (kind, _) in WAYS.items() if kind not in HIDDEN]
    kinds = write_shards(tmp_path / "data", SHARDS, SAMPLES, {20 * n: ways[n % len(ways)] for n in range(50)})

    assert main(arguments(tmp_path, tmp_path / "data", {})) == 2

    assert stop_count(capsys.readouterr().err, kinds, 0.01) == 50
    assert not (tmp_path / "run").exists()


def test_a_share_of_zero_stops_at_the_first(
    fifty: tuple[Path, Kinds], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(tmp_path, fifty[0], {"data.max_bad_share": 0})) == 2

    # Of the first batch that has any: it is whole before anyone counts.
    count = stop_count(capsys.readouterr().err, fifty[1], 0)
    assert 1 <= count <= 5
    assert len(named(tmp_path)) == count


@pytest.mark.parametrize("mode", ["random, workers", "sequential", "resident"])
def test_a_larger_share_lets_them_pass(mode: str, fifty: tuple[Path, Kinds], tmp_path: Path) -> None:
    assert main(arguments(tmp_path, fifty[0], {"data.max_bad_share": 0.2, **MODES[mode]})) == 0

    assert len(fifty[1]) == 50
    assert_names_all(tmp_path, fifty[1])


def test_a_second_member_of_one_name_is_named_and_the_first_is_used(tmp_path: Path) -> None:
    ways = list({**WAYS, **MORE_WAYS})
    kinds = write_shards(tmp_path / "data", SHARDS, SAMPLES, {20 * n: ways[n % len(ways)] for n in range(50)})

    assert main(arguments(tmp_path, tmp_path / "data", {"data.max_bad_share": 0.06})) == 0

    assert set(kinds.values()) >= {"duplicate", "path", "label", "no-image"}
    assert_names_all(tmp_path, kinds)


def die_and_resume(argv: list[str], tmp_path: Path, half: bytes) -> list[tuple[str, str]]:
    """A run that is killed, and may leave half a line, and its resumption; what was named at the kill."""
    process = multiprocessing.get_context("fork").Process(target=train_and_die, args=(argv, 8))
    process.start()
    process.join(60)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    before = named(tmp_path)
    with (tmp_path / "run" / "bad_samples.jsonl").open("ab") as file:
        file.write(half)
    assert main(argv) == 0
    return before


@pytest.mark.dist
@pytest.mark.parametrize("mode", ["random", "sequential", "resident"])
def test_a_resumed_run_counts_each_once(mode: str, ten: tuple[Path, Kinds], tmp_path: Path) -> None:
    before = die_and_resume(arguments(tmp_path, ten[0], MODES[mode]), tmp_path, b"")

    assert 3 <= len(before) < 10
    assert named(tmp_path)[: len(before)] == before
    assert_names_all(tmp_path, ten[1])
    counts = [row["bad_samples"] for row in read_metrics(tmp_path / "run")]
    assert counts == sorted(counts)


# The last one ends within a letter of two bytes.
@pytest.mark.dist
@pytest.mark.parametrize("half", [b"{", b'{"key": "train-000001.tar/x', '{"key": "\u00fc'.encode()[:-1]])
def test_half_a_line_of_a_killed_process_is_dropped(
    half: bytes, ten: tuple[Path, Kinds], tmp_path: Path
) -> None:
    before = die_and_resume(arguments(tmp_path, ten[0], {}), tmp_path, half)

    assert named(tmp_path)[: len(before)] == before
    assert_names_all(tmp_path, ten[1])


def _train_on_ranks(argv: list[str]) -> tuple[int, str]:
    """Exit code and error output of a rank."""
    errors = io.StringIO()
    without_pictures(pytest.MonkeyPatch())
    with contextlib.redirect_stderr(errors):
        code = main(argv)
    return code, errors.getvalue()


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["random", "sequential", "resident"])
def test_two_ranks_name_what_either_met(mode: str, ten: tuple[Path, Kinds], tmp_path: Path) -> None:
    assert run_ranks(2, _train_on_ranks, arguments(tmp_path, ten[0], MODES[mode])) == [(0, "")] * 2

    # Before the evaluation, in which every rank reads everything.
    assert read_metrics(tmp_path / "run")[-1]["bad_samples"] == 9
    assert_names_all(tmp_path, ten[1])


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["random", "sequential", "resident"])
def test_two_ranks_stop_together(mode: str, fifty: tuple[Path, Kinds], tmp_path: Path) -> None:
    (code, errors), (other_code, other_errors) = run_ranks(
        2, _train_on_ranks, arguments(tmp_path, fifty[0], MODES[mode])
    )

    assert (code, other_code) == (2, 2)
    assert len(errors.splitlines()) == len(other_errors.splitlines()) == 1
    assert stop_count(errors or other_errors, fifty[1], 0.01) > 10
    if mode != "resident":
        assert 11 <= len(named(tmp_path)) == len(set(named(tmp_path)))
        assert set(named(tmp_path)) <= set(fifty[1].items())


@pytest.mark.parametrize("resident", ["never", "always"])
def test_unusual_images_are_no_bad_ones(resident: str, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for number in range(80):
        picture = Image.fromarray(pixels(number))
        grey16 = Image.fromarray(np.random.default_rng(number).integers(0, 2**16, (16, 16), dtype=np.uint16))
        frames = {"save_all": True, "append_images": [Image.fromarray(pixels(number + 1000))]}
        transparent = Image.merge("RGBA", (*picture.split(), picture.convert("L")))
        contents = {
            "cmyk.jpg": encode(picture.convert("CMYK"), "JPEG"),
            "grey.jpg": encode(picture.convert("L"), "JPEG"),
            "progressive.jpg": encode(picture, "JPEG", progressive=True),
            "grey16.png": encode(grey16),
            "grey16.tif": encode(grey16, "TIFF"),
            "bits.png": encode(picture.convert("1")),
            "palette.png": encode(picture.quantize(16), transparency=3),
            "transparent.png": encode(transparent),
            "transparent.webp": encode(transparent, "WEBP", lossless=True),
            "frames.png": encode(picture, "PNG", **frames),
            "frames.webp": encode(picture, "WEBP", **frames),
            "frames.tif": encode(picture, "TIFF", **frames),
        }
        suffix = list(contents)[number % len(contents)]
        path = folder / f"class{number // 12 % 2}" / f"{number}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents[suffix])
    fields = {
        "data.dataset": "folder",
        "data.max_bad_share": 0,
        "data.resident": resident,
        "data.augment": "crop-flip",
        **{f"{level}.batch_size": 8 for level in ("pretrain", "head", "mask")},
    }

    assert main(arguments(tmp_path, folder, fields)) == 0

    assert read_result(tmp_path / "run")["bad_samples"] == 0
    assert not (tmp_path / "run" / "bad_samples.jsonl").exists()
