"""Room, speed and locks of a folder; nothing is left in it."""

from __future__ import annotations

import fcntl
import resource
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from mlomae.doctor import storage
from mlomae.doctor.checks import Result, carry_out

Usage = namedtuple("Usage", "total used free")


def result(name: str, folder: Path) -> Result:
    (check,) = (check for check in storage.storage_checks(folder) if check.name == name)
    return carry_out(check)


def test_a_folder_is_left_as_it_was(tmp_path: Path) -> None:
    for name in ("free space", "speed", "locks"):
        assert result(name, tmp_path).found.startswith(f"{tmp_path}: ")
    assert result("locks", tmp_path).status == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there_yet_is_looked_at_where_it_would_be_made(tmp_path: Path) -> None:
    assert result("locks", tmp_path / "runs" / "mine") == result("locks", tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["free space", "speed", "locks"])
def test_a_folder_that_cannot_be_used_is_a_problem(name: str, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    checks = {check.name: check for check in storage.storage_checks(tmp_path / "runs")}
    (tmp_path / "runs").rmdir()

    found = carry_out(checks[name])
    assert found.status == "problem"
    assert found.found.startswith("FileNotFoundError: ")
    assert "--run-dir" in (found.fix or "")


@pytest.mark.parametrize(
    ("name", "least"), [("free space", storage.LEAST_FREE), ("shared memory", storage.LEAST_SHARED)]
)
def test_little_room_is_a_problem(
    name: str, least: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_SHARED", tmp_path)
    for free, status in ((least, "ok"), (least - 1, "problem")):
        monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: Usage(10**13, 0, free))
        assert result(name, tmp_path).status == status
    assert "of 10,000.0 GB free" in result(name, tmp_path).found


def test_a_system_without_shared_memory_has_no_problem_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_SHARED", tmp_path / "shm")

    assert result("shared memory", tmp_path).status == "absent"


def test_a_slow_disk_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LEAST_SPEED", 10**15)
    assert result("speed", tmp_path).status == "problem"

    monkeypatch.setattr(storage, "LEAST_SPEED", 0)
    assert result("speed", tmp_path).status == "ok"


def test_a_file_system_that_ignores_locks_is_a_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", lambda file, how: None)
    assert result("locks", tmp_path).found == f"{tmp_path}: a lock does not keep a second run out"

    def refuse(file: object, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", refuse)
    found = result("locks", tmp_path)
    assert (found.status, found.found) == ("problem", "OSError: [Errno 95] Operation not supported")


@pytest.mark.parametrize(
    ("limits", "status", "found"),
    [
        ((1024, 4096), "ok", "1,024 at a time"),
        ((256, 4096), "problem", "256 at a time"),
        ((resource.RLIM_INFINITY,) * 2, "ok", "no limit"),
    ],
)
def test_open_files(
    limits: tuple[int, int], status: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits)

    entry = result("open files", tmp_path)
    assert (entry.status, entry.found) == (status, found)
    assert entry.fix == ("ulimit -n 4096" if status == "problem" else None)
