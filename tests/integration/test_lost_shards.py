"""Shards that vanish, are cut or change during a run end it with one line, or are counted; it never hangs."""

from __future__ import annotations

import json
import multiprocessing
import signal
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mlomae.cli import main
from mlomae.data.shards.index import write_index
from mlomae.data.shards.scan import scan
from mlomae.trainer import Trainer
from tests.integration.bad_shards import good, write_shards, write_tar
from tests.integration.tiny import read_result, without_pictures, write_recipe

SHARDS, SAMPLES = 5, 20
TIMEOUT = 60
LOST = "train-000002.tar"
MODES: dict[str, dict[str, Any]] = {
    "random": {"data.access": "random"},
    "random, workers": {"data.access": "random", "data.workers": 2},
    "sequential": {"data.access": "sequential"},
    "sequential, workers": {"data.access": "sequential", "data.workers": 2},
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)
    monkeypatch.setattr("mlomae.data.urls.DELAYS", (0.01, 0.02))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    write_shards(tmp_path / "data", SHARDS, SAMPLES)
    return tmp_path / "data"


@contextmanager
def time_limit() -> Iterator[None]:
    """Fails what takes longer than TIMEOUT."""

    def fail(*_: object) -> None:
        raise AssertionError(f"it still runs after {TIMEOUT} s")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(TIMEOUT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def train(tmp_path: Path, data: Path | str, fields: dict[str, Any]) -> int:
    """The exit code of a run."""
    fields = {
        "iterations": 8,
        "model.img_size": 16,
        "model.patch_size": 4,
        "model.in_chans": 3,
        "data.dataset": "shards",
        "data.path": str(data),
        "data.resident": "never",
        **fields,
    }
    recipe = write_recipe(tmp_path / "tiny.yaml", fields)
    with time_limit():
        return main(["train", "--config", str(recipe), "--run-dir", str(tmp_path / "run")])


def before_iteration(monkeypatch: pytest.MonkeyPatch, iteration: int, action: Callable[[], object]) -> None:
    """Lets something happen to the shards in the midst of a run."""
    iterate = Trainer.iterate

    def acting(self: Trainer, current: int) -> object:
        if current == iteration:
            action()
        return iterate(self, current)

    monkeypatch.setattr(Trainer, "iterate", acting)


@pytest.mark.parametrize("mode", MODES)
def test_a_shard_that_is_deleted_stops_the_run_with_its_name(
    mode: str,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # After its headers were read, but before its images are.
    before_iteration(monkeypatch, 0, (shards / LOST).unlink)

    assert train(tmp_path, shards, MODES[mode]) == 2

    assert capsys.readouterr().err == (
        f"mlomae: error: {shards / LOST}: cannot be read after 3 attempts (No such file or directory); "
        "check that it is there\n"
    )
    assert multiprocessing.active_children() == [], "loader processes were left behind"


@pytest.mark.parametrize("mode", MODES)
def test_a_shard_that_is_cut_stops_the_run_with_its_name(
    mode: str,
    shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    size = (shards / LOST).stat().st_size // 3

    def cut() -> None:
        with (shards / LOST).open("r+b") as file:
            file.truncate(size)

    before_iteration(monkeypatch, 1, cut)

    assert train(tmp_path, shards, MODES[mode]) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"mlomae: error: {shards / LOST}: cannot be read after 3 attempts (it ends at byte {size}"
    )


@pytest.mark.parametrize("access", ["random", "sequential"])
def test_a_shard_that_comes_back_in_time_changes_nothing(
    access: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost, aside = shards / LOST, shards / "aside"
    before_iteration(monkeypatch, 0, lambda: lost.rename(aside))

    def come_back(_: float) -> None:
        if aside.exists():
            aside.rename(lost)

    monkeypatch.setattr("mlomae.data.urls.time.sleep", come_back)

    assert train(tmp_path, shards, {"data.access": access}) == 0

    assert lost.exists()
    assert read_result(tmp_path / "run")["bad_samples"] == 0


@pytest.mark.parametrize("mode", ["random", "random, workers", "sequential, workers", "resident"])
def test_samples_of_a_shard_that_was_replaced_are_misplaced(mode: str, shards: Path, tmp_path: Path) -> None:
    index = scan([str(path) for path in sorted(shards.glob("*.tar"))])
    write_index(shards / "train-index.json", index)
    size = (shards / LOST).stat().st_size
    # Other samples of the same sizes: the file's size tells nothing.
    first = SAMPLES * 2
    members = [
        (name.replace("0", "x", 1), content)
        for n in range(first, first + SAMPLES)
        for name, content in good(n)
    ]
    write_tar(shards / LOST, members)
    assert (shards / LOST).stat().st_size == size
    fields = {**MODES.get(mode, {"data.resident": "always"}), "data.max_bad_share": 0.2}

    assert train(tmp_path, shards, fields) == 0

    assert read_result(tmp_path / "run")["bad_samples"] == SAMPLES
    lines = (tmp_path / "run" / "bad_samples.jsonl").read_text().splitlines()
    found = sorted((entry["key"], entry["kind"]) for entry in map(json.loads, lines))
    assert found == [(f"{LOST}/{number:05d}", "misplaced") for number in range(first, first + SAMPLES)]


@pytest.mark.parametrize("access", ["random", "sequential"])
def test_a_stretch_of_bad_samples_is_passed_over(access: str, tmp_path: Path) -> None:
    # As where a part of a disk reads as zeros. Few samples of a lane are in memory at a time.
    kinds = write_shards(tmp_path / "data", SHARDS, 100, {130 + n: "an empty file" for n in range(30)})
    fields = {"data.access": access, "data.shuffle_buffer": 32, "data.max_bad_share": 0.1, "iterations": 40}

    assert train(tmp_path, tmp_path / "data", fields) == 0

    assert len(kinds) == read_result(tmp_path / "run")["bad_samples"] == 30


def test_a_replaced_shard_of_another_size_is_refused(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = scan([str(path) for path in sorted(shards.glob("*.tar"))])
    write_index(shards / "train-index.json", index)
    write_tar(shards / LOST, [member for number in range(40, 59) for member in good(number)])

    assert train(tmp_path, shards, {}) == 2

    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mlomae: error: {shards / LOST}: has ")
    assert "but its index says" in line
    assert not (tmp_path / "run").exists()


# As webdataset writes them (pax), and as GNU tar does; the last one is no UTF-8.
@pytest.mark.parametrize("style", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT], ids=["pax", "gnu"])
@pytest.mark.parametrize("letter", ["ü", "日本", "\u2028", "\x85", "\udcfc"], ids=ascii)
def test_names_may_have_any_letters(letter: str, style: int, tmp_path: Path) -> None:
    members = []
    for number in range(100):
        (name, image), (label_name, label) = good(number)
        # One of them is bad, so that its name is written down.
        members += [(letter + name, b"" if number == 50 else image), (letter + label_name, label)]
    write_tar(tmp_path / "data" / "train-000000.tar", members, style)

    assert train(tmp_path, tmp_path / "data", {}) == 0

    (line,) = (tmp_path / "run" / "bad_samples.jsonl").read_bytes().split(b"\n")[:-1]
    assert json.loads(line)["key"] == f"train-000000.tar/{letter}00050"
    assert read_result(tmp_path / "run")["bad_samples"] == 1
    (tmp_path / "run" / "result.json").unlink()  # the run goes on at its last checkpoint
    assert train(tmp_path, tmp_path / "data", {}) == 0
    assert read_result(tmp_path / "run")["bad_samples"] == 1
