"""Writing in the background: order, failures on a disk that is full, and ends of the process."""

from __future__ import annotations

import errno
import resource
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mlomae import checkpoint
from mlomae.checkpoint import BackgroundWriter, newest, read

SMALL, LARGE = 100, 500_000


class Gate:
    """Holds every save until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._opened, self.waiting = threading.Event(), threading.Event()
        write_file = checkpoint.write_file

        def held(path: Path, parts: Any) -> Any:
            self.waiting.set()
            assert self._opened.wait(30)
            return write_file(path, parts)

        monkeypatch.setattr(checkpoint, "write_file", held)

    def open(self) -> None:
        self._opened.set()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def values(step: int, size: int = SMALL) -> dict[str, Tensor]:
    return {"head.weight.w": torch.full((size,), float(step))}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_training_goes_on_while_one_is_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    writer = BackgroundWriter(folder, keep=2)
    writer.submit(1, values(1), {"step": 1}, None)
    assert gate.waiting.wait(30)  # and here we are
    assert newest(folder) is None
    gate.open()
    writer.submit(2, values(2), {"step": 2}, None)  # waits for the first one
    assert (folder / "step-00000001").exists()
    writer.finish()
    assert names(folder) == ["step-00000001", "step-00000002"]
    found = read(folder / "step-00000002")
    assert found.state == {"step": 2}
    assert bool((found.tensors["head.weight.w"] == 2).all())
    assert load_file(folder.parent / "encoder.safetensors") == {}


def test_a_save_beside_a_live_one_waits_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    writers = [BackgroundWriter(folder, keep=2) for _ in range(2)]
    writers[0].submit(1, values(1), {}, None)
    assert gate.waiting.wait(30)
    writers[1].submit(2, values(2), {}, None)  # would sweep the first one's folder
    gate.open()
    for writer in writers:
        writer.finish()
    assert names(folder) == ["step-00000001", "step-00000002"]


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """The system refuses to make a file larger than this many bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("part", ["pretrain.weight.encoder.w", "head.weight.w"])
@pytest.mark.parametrize("way", ["finish", "submit", "close"])
def test_a_failure_surfaces_and_the_checkpoint_before_stays(part: str, way: str, folder: Path) -> None:
    writer = BackgroundWriter(folder, keep=1)
    writer.submit(1, values(1), {"step": 1}, None)
    writer.finish()
    before = (folder.parent / "encoder.safetensors").read_bytes()
    with files_up_to(100_000):
        writer.submit(2, values(2) | {part: torch.ones(LARGE)}, {"step": 2}, None)
        if way == "close":
            with pytest.warns(
                UserWarning, match=r"^the last checkpoint could not be written \(.*File too large"
            ):
                writer.close()
        else:
            again = {"finish": writer.finish, "submit": lambda: writer.submit(3, values(3), {}, None)}[way]
            with pytest.raises(OSError, match="File too large") as caught:
                again()
            assert caught.value.filename == str(folder / "step-00000002")
    assert names(folder) == ["step-00000001"]
    assert newest(folder) == folder / "step-00000001"
    assert (folder.parent / "encoder.safetensors").read_bytes() == before
    # It was said once; what follows is a new attempt.
    writer.submit(4, values(4), {"step": 4}, None)
    writer.finish()
    writer.close()
    assert names(folder) == ["step-00000004"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    path = tmp_path / "disk"
    path.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", path], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    folder = small_disk / "checkpoints"
    writer = BackgroundWriter(folder, keep=1)
    writer.submit(1, values(1, 50_000), {"step": 1}, None)
    writer.finish()
    for step in (2, 3):  # what the first failure took is free again
        writer.submit(step, values(step, LARGE), {"step": step}, None)
        with pytest.raises(OSError, match="No space left on device") as caught:
            writer.finish()
        assert caught.value.errno == errno.ENOSPC
        assert names(folder) == ["step-00000001"]
        path = newest(folder)
        assert path is not None
        assert bool((read(path).tensors["head.weight.w"] == 1).all())
    writer.submit(4, values(4, 50_000), {"step": 4}, None)
    writer.finish()
    assert names(folder) == ["step-00000004"]


def test_a_write_that_never_ends_is_given_up(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    monkeypatch.setattr(checkpoint, "_PATIENCE", 0.01)
    writer = BackgroundWriter(folder, keep=1)
    writer.submit(1, values(1), {}, None)
    with pytest.warns(UserWarning, match="^the last checkpoint is not written after"):
        writer.close()
    gate.open()
    for thread in threading.enumerate():
        if thread.name == "checkpoint":
            thread.join()


CRASH = """
import sys, threading
from pathlib import Path
import torch
from mlomae import checkpoint

def held(path, parts):
    threading.Event().wait()

writer = checkpoint.BackgroundWriter(Path(sys.argv[1]), keep=1)
writer.submit(1, {"head.weight.w": torch.ones(3)}, {}, None)
writer.finish()
checkpoint.write_file = held
writer.submit(2, {"head.weight.w": torch.ones(3)}, {}, None)
raise RuntimeError("crash")
"""


@pytest.mark.dist
def test_a_process_that_crashes_does_not_hang(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(folder)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "RuntimeError: crash"
    assert newest(folder) == folder / "step-00000001"
