"""What a run's surroundings do to it: one line, and the same command ends like an undisturbed run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mlomae import levels
from mlomae.cli import main
from mlomae.hypergradient import Hypergradient
from mlomae.trainer import Trainer
from tests.architecture.source_tree import ROOT
from tests.integration.tiny import FEW_TO_FIT, read_metrics, without_pictures, write_recipe

FIELDS: dict[str, Any] = {**FEW_TO_FIT, "iterations": 8, "loggers": []}
AT = 5
Act = Callable[[Trainer], None]
# What the libraries have taken, and 1.5 GiB: enough for the weights of a ViT-B, not for its activations.
WITH_LITTLE_MEMORY = {
    "cpu": """
import re, resource, sys
from pathlib import Path
import mlomae.run
from mlomae.cli import main
taken = 1024 * int(re.search(r"VmSize:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
resource.setrlimit(resource.RLIMIT_AS, (taken + 3 * 2**29, -1))
sys.exit(main(sys.argv[1:]))
""",
    "cuda": """
import sys
import torch
from mlomae.cli import main
torch.cuda.set_per_process_memory_fraction(3 * 2**29 / torch.cuda.get_device_properties(0).total_memory)
sys.exit(main(sys.argv[1:]))
""",
}


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    without_pictures(monkeypatch)
    return write_recipe(tmp_path / "tiny.yaml", {**FIELDS, "data.workers": 0})


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The log of a run to which nothing happens."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = write_recipe(folder / "tiny.yaml", {**FIELDS, "data.workers": 0, "picture_every": 100})
    assert main(["train", "--config", str(recipe), "--run-dir", str(folder / "run")]) == 0
    return read_metrics(folder / "run")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of eight megabytes."""
    path = tmp_path / "disk"
    path.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


def train(recipe: Path, run: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
    """The exit code, and what went to standard error."""
    code = main(["train", "--config", str(recipe), "--run-dir", str(run), *more])
    return code, capsys.readouterr().err


def before_iteration(monkeypatch: pytest.MonkeyPatch, act: Act) -> None:
    """Does something before iteration ``AT``, in the first process that comes by."""
    iterate, done = Trainer.iterate, list[int]()

    def disturbed(self: Trainer, iteration: int) -> Any:
        if iteration == AT and not done:
            done.append(iteration)
            act(self)
        return iterate(self, iteration)

    monkeypatch.setattr(Trainer, "iterate", disturbed)


@pytest.mark.parametrize(
    ("where", "name", "told"),
    [
        (levels.PretrainLevel, "_loss", "pretrain/descend|pretrain/forward|selection"),
        (Hypergradient, "direction", "direction"),
        (Hypergradient, "influence", "influence"),
    ],
    ids=["pretrain", "head", "mask"],
)  # fmt: skip
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: …"),
    ],
    ids=["gpu", "cpu"],
)
def test_memory_that_runs_out_in_a_level(
    where: Any, name: str, told: str, error: Exception, recipe: Path, undisturbed: list[dict[str, Any]],
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    with monkeypatch.context() as patched:

        def fail(trainer: Trainer) -> None:
            def out_of_memory(*_: object) -> None:
                raise error

            patched.setattr(where, name, out_of_memory)

        before_iteration(patched, fail)
        code, line = train(recipe, tmp_path / "run", capsys)
    assert code == 2 and line.count("\n") == 1
    assert line.startswith("mlomae: error: out of memory in ")
    assert line.split(" in ")[1].split(" of ")[0] in told.split("|")
    assert f"of iteration {AT}: " in line and "goes on from the last checkpoint" in line

    assert train(recipe, tmp_path / "run", capsys)[0] == 0
    assert read_metrics(tmp_path / "run") == undisturbed


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_memory_that_really_runs_out(device: str, tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path / "large.yaml",
        {
            **FIELDS,
            "device": device,
            "compute.execution": "eager",
            "model.arch": "vit_base",
            "model.patch_size": 1,
            "pretrain.batch_size": 128,
            "masking.ratio": 0.1,
            "model.norm_pix": False,
        },
    )

    words = ["train", "--config", str(recipe), "--run-dir", str(tmp_path / "run")]
    found = subprocess.run(
        [sys.executable, "-c", WITH_LITTLE_MEMORY[device], *words],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert found.returncode == 2, found.stderr
    (line,) = found.stderr.splitlines()
    assert line.startswith("mlomae: error: out of memory in pretrain/forward of iteration 0: ")
    assert "raise pretrain.micro_batches" in line


def test_a_loader_that_is_killed(
    fill_images: Callable[..., Path], recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folder = fill_images(mode="L", amount=300)
    more = ["--data.dataset", "folder", "--data.path", str(folder), "--data.workers", "1"]
    more += ["--data.resident", "never"]

    def kill(trainer: Trainer) -> None:
        import multiprocessing

        for child in multiprocessing.active_children():
            assert child.pid is not None
            os.kill(child.pid, signal.SIGKILL)
            child.join()

    with monkeypatch.context() as patched:
        before_iteration(patched, kill)
        code, line = train(recipe, tmp_path / "run", capsys, *more)
    assert code == 2 and line.count("\n") == 1
    assert line.startswith("mlomae: error: data.workers: a loader process ended without a word in data of ")

    assert train(recipe, tmp_path / "run", capsys, *more)[0] == 0
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == list(range(1, 9))


@pytest.mark.parametrize("loggers", ["[]", "[tensorboard]"])
def test_a_disk_that_is_full(
    loggers: str, disk: Path, recipe: Path, undisturbed: list[dict[str, Any]],
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    filler = disk / "filler"

    def fill(trainer: Trainer) -> None:
        trainer.writer.finish()
        with pytest.raises(OSError, match="No space left"), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))

    with monkeypatch.context() as patched:
        before_iteration(patched, fill)
        # Where the log is what fails first, so does the checkpoint, on the way out.
        patched.setattr(warnings, "warn", lambda *_, **__: None)
        code, line = train(recipe, disk / "run", capsys, "--loggers", loggers)
    assert code == 2 and line.count("\n") == 1
    assert "cannot be written (No space left on device)" in line

    filler.unlink()
    assert train(recipe, disk / "run", capsys, "--loggers", loggers)[0] == 0
    assert read_metrics(disk / "run") == undisturbed


def test_a_disk_that_is_read_only(disk: Path, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def remount(how: str) -> None:
        subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True, capture_output=True)

    remount("ro")
    code, line = train(recipe, disk / "run", capsys)
    assert code == 2 and line.count("\n") == 1
    assert "cannot be written (Read-only file system)" in line
    remount("rw")
    assert list(disk.iterdir()) == []
    assert train(recipe, disk / "run", capsys, "--iterations", "2")[0] == 0


def test_a_clock_that_jumps(
    recipe: Path, undisturbed: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    now, jumps = time.time, iter(range(10**6))
    day = 86_400.0
    monkeypatch.setattr(time, "time", lambda: now() + day * (-1) ** next(jumps) * 400)
    assert train(recipe, tmp_path / "run", capsys, "--loggers", "[tensorboard]")[0] == 0
    assert read_metrics(tmp_path / "run") == undisturbed
