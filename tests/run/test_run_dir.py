"""A run directory has one owner, holds one run, and is left alone when it is refused."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mlomae.config import Config, load_config
from mlomae.errors import UserError
from mlomae.run_dir import RunDir, Status, link_atomically, to_json, write_atomically

OWNER = """
import os, sys
from pathlib import Path
from mlomae.config import Config
from mlomae.run_dir import RunDir

run_dir = RunDir(Path(sys.argv[1]), Config())
run_dir.claim(primary=True)
if os.fork():  # a loader process, which outlives its killed parent for a while
    print("claimed", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def claimed(tmp_path: Path) -> Iterator[RunDir]:
    run_dir = RunDir(tmp_path / "runs" / "x", Config())
    assert run_dir.claim(primary=True) is Status.NEW
    yield run_dir
    run_dir.release()


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def refused(path: Path, config: Config) -> str:
    """The one-line refusal of a claim, which must not have touched the folder."""
    before = contents(path)
    with pytest.raises(UserError) as caught:
        RunDir(path, config).claim(primary=True)
    assert contents(path) == before
    message = str(caught.value)
    assert message.startswith(f"run_dir {path}: ")
    assert "\n" not in message
    return message


def test_new_directory_receives_the_resolved_config(claimed: RunDir) -> None:
    assert load_config(claimed.config, {}) == Config()
    assert {path.name for path in claimed.path.iterdir()} == {"config.yaml", ".lock"}


def test_a_later_attempt_waits_for_the_one_before_to_let_go(claimed: RunDir) -> None:
    other = RunDir(claimed.path, Config())
    with pytest.raises(UserError, match="in use by another process"):
        other.claim(primary=True)
    timer = threading.Timer(0.3, claimed.release)
    timer.start()
    try:
        assert other.claim(primary=True, wait=60.0) is Status.NEW
    finally:
        timer.join()
        other.release()


def test_status_follows_checkpoints_and_result_on_every_rank(claimed: RunDir) -> None:
    other = RunDir(claimed.path, Config())
    assert (claimed.claim(primary=True), other.claim(primary=False)) == (Status.NEW, Status.NEW)
    (claimed.checkpoints / "step-00000100").mkdir(parents=True)
    assert (claimed.claim(primary=True), other.claim(primary=False)) == (Status.RESUME, Status.RESUME)
    claimed.write_result({"accuracy": 0.5, "loss": float("nan")})
    assert (claimed.claim(primary=True), other.claim(primary=False)) == (Status.COMPLETE, Status.COMPLETE)
    assert json.loads(claimed.result.read_text()) == {"accuracy": 0.5, "loss": None}


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    assert RunDir(tmp_path / "x", Config()).claim(primary=False) is Status.NEW
    assert not (tmp_path / "x").exists()


def test_different_run_is_refused_with_what_differs(claimed: RunDir) -> None:
    claimed.release()
    message = refused(claimed.path, load_config(None, {"pretrain.lr": "1e-4"}))
    assert "holds a different run (pretrain.lr is 0.001 there, 0.0001 asked for)" in message
    changes = {"seed": "1", "iterations": "7", "mask.lr": "0", "head.lr": "0", "pretrain.lr": "0"}
    assert "; and 2 more)" in refused(claimed.path, load_config(None, changes))


def test_changes_that_do_not_change_the_computation_are_allowed(claimed: RunDir) -> None:
    claimed.release()
    changed = load_config(None, {"log_every": "3", "data.workers": "2", "keep_checkpoints": "5"})
    again = RunDir(claimed.path, changed)
    assert again.claim(primary=True) is Status.NEW
    assert load_config(again.config, {}) == Config()
    again.release()


def test_foreign_folder_file_and_damaged_config_are_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert "not a run directory" in refused(tmp_path, Config())
    assert "cannot be read" in refused(tmp_path / "notes.txt", Config())
    (tmp_path / "config.yaml").write_text("seed: [")
    assert "config.yaml is damaged" in refused(tmp_path, Config())


def test_remains_of_a_process_killed_during_its_claim_do_not_matter(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.yaml.tmp").write_text("se")
    run_dir = RunDir(tmp_path, Config())
    assert run_dir.claim(primary=True) is Status.NEW
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", ".lock"}
    run_dir.release()


def test_two_live_processes_cannot_share_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "x"
    command = [sys.executable, "-c", OWNER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == "claimed\n"
        assert re.search(rf"in use by another process \(pid {owner.pid} on \S+\)", refused(path, Config()))
        owner.kill()
        owner.wait()
        run_dir = RunDir(path, Config())
        assert run_dir.claim(primary=True) is Status.NEW
        run_dir.release()


def test_atomic_write_keeps_the_old_file_when_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "result.json"
    write_atomically(path, b"old")

    def fail(descriptor: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="no space left"):
        write_atomically(path, b"new")
    assert contents(tmp_path) == {str(path): b"old"}


@pytest.mark.parametrize("links", [True, False])
def test_atomic_link_shares_or_copies(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, path = tmp_path / "source", tmp_path / "path"
    source.write_bytes(b"new")
    write_atomically(path, b"old")

    def refuse(*paths: Path) -> None:
        raise OSError(errno.EPERM, "no links here")

    if not links:
        monkeypatch.setattr("os.link", refuse)
    for _ in range(2):  # the second time it is there already
        link_atomically(source, path)
        assert contents(tmp_path) == {str(path): b"new", str(source): b"new"}
        assert path.samefile(source) == links


def test_atomic_link_keeps_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "path"
    write_atomically(path, b"old")
    with pytest.raises(FileNotFoundError):
        link_atomically(tmp_path / "missing", path)
    assert contents(tmp_path) == {str(path): b"old"}


def test_json_has_null_for_what_json_does_not_know() -> None:
    value = {"a": [1.5, float("inf")], "b": {"c": (float("nan"),)}, "d": "x", "e": 3}
    assert json.loads(to_json(value)) == {"a": [1.5, None], "b": {"c": [None]}, "d": "x", "e": 3}
