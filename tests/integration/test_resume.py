"""A run that was killed and started again ends as if it had never been interrupted, bit for bit."""

from __future__ import annotations

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mlomae import checkpoint
from mlomae.cli import main
from mlomae.trainer import Trainer
from tests.integration.tiny import (
    FEW_TO_FIT,
    read_metrics,
    read_result,
    train_and_die,
    without_pictures,
    write_recipe,
)

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS = 45
# Checkpoints fall between two log lines: what the meters hold then must not be lost.
SCHEDULE = {
    **FEW_TO_FIT,
    "iterations": ITERATIONS,
    "log_every": 5,
    "checkpoint_every": 7,
    "picture_every": 25,
    "data.augment": "shift",
}
START = 120.0  # seconds within which a process must get going


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", SCHEDULE)


@pytest.fixture(scope="module")
def uninterrupted(recipe: Path) -> Path:
    """The run directory of a run that nobody disturbed."""
    run_dir = recipe.parent / "uninterrupted"
    assert main(["train", "--config", str(recipe), "--run-dir", str(run_dir)]) == 0
    return run_dir


def assert_same_run(actual: Path, expected: Path) -> None:
    assert read_metrics(actual) == read_metrics(expected)
    assert (actual / "encoder.safetensors").read_bytes() == (expected / "encoder.safetensors").read_bytes()
    found, wanted = (
        checkpoint.read(folder / "checkpoints" / f"step-{ITERATIONS:08d}").tensors
        for folder in (actual, expected)
    )
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert {name.split(".")[1] for name in wanted} == {"weight", "exp_avg", "exp_avg_sq", "step"}
    assert read_result(actual) == read_result(expected)
    assert "knn_accuracy" in read_result(expected)


def steps_logged(run_dir: Path) -> int:
    """The last step of metrics.jsonl as it is now; the file may be growing."""
    try:
        lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    whole = [line for line in lines if line.endswith("\n")]
    return int(json.loads(whole[-1])["step"]) if whole else 0


def interrupt(command: list[str], run_dir: Path, step: int, number: signal.Signals) -> tuple[int, str]:
    """Starts a command, sends its process group a signal once ``step`` is logged; (exit code, stderr)."""
    deadline = time.monotonic() + START
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            while steps_logged(run_dir) < step:
                assert process.poll() is None, process.communicate()[1]
                assert time.monotonic() < deadline
                time.sleep(0.005)
            os.killpg(process.pid, number)
            _, errors = process.communicate(timeout=START)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    return process.returncode, errors


@pytest.mark.dist
@pytest.mark.slow
def test_processes_that_were_interrupted_and_killed(
    recipe: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(recipe), "--run-dir", str(run_dir)]

    # A terminal's ctrl-c reaches the loader processes too.
    code, errors = interrupt([*command, "--data.workers", "2"], run_dir, 10, signal.SIGINT)
    assert code == 130
    notice, last = errors.splitlines()
    assert notice == "mlomae: interrupted: saves after this step and stops; once more stops at once"
    saved = re.fullmatch(
        r"mlomae: stopped by SIGINT after iteration (\d+), which is saved; the same command goes on", last
    )
    assert saved
    assert (run_dir / "checkpoints" / f"step-{int(saved[1]):08d}").exists()
    code, _ = interrupt(command, run_dir, 25, signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (run_dir / "result.json").exists()
    assert steps_logged(run_dir) < ITERATIONS
    done = subprocess.run(command, capture_output=True, text=True, timeout=START)

    assert (done.returncode, done.stderr) == (0, "")
    first = int(
        next(line for line in done.stdout.splitlines() if line.startswith("step")).split()[1].split("/")[0]
    )
    assert first > 7  # it did not start over
    assert_same_run(run_dir, uninterrupted)


# Before the first checkpoint, right after one, between a log line and a checkpoint, at the last iteration.
@pytest.mark.dist
@pytest.mark.parametrize(
    ("kills", "workers"),
    [([3], 0), ([7], 0), ([12, 13], 0), ([ITERATIONS - 1], 0), ([20], 2)],
    ids=["before-first", "at-checkpoint", "twice", "at-end", "workers"],
)
def test_a_killed_run_ends_like_an_undisturbed_one(
    kills: list[int],
    workers: int,
    recipe: Path,
    uninterrupted: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_pictures(monkeypatch)
    argv = ["train", "--config", str(recipe), "--run-dir", str(tmp_path), "--data.workers", str(workers)]
    for iteration in kills:
        process = multiprocessing.get_context("fork").Process(target=train_and_die, args=(argv, iteration))
        process.start()
        process.join(START)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (tmp_path / "result.json").exists()

    assert main(argv) == 0

    assert_same_run(tmp_path, uninterrupted)


def test_a_complete_run_is_reported_and_not_trained_again(
    recipe: Path, uninterrupted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("the run is complete")

    monkeypatch.setattr(Trainer, "__init__", fail)
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}

    assert main(["train", "--config", str(recipe), "--run-dir", str(uninterrupted)]) == 0

    result = json.loads((uninterrupted / "result.json").read_text())
    assert capsys.readouterr().out.splitlines() == [f"{name}: {value}" for name, value in result.items()]
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")} == before


def test_only_the_evaluation_is_repeated_when_it_was_missed(
    recipe: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = read_result(uninterrupted)
    (uninterrupted / "result.json").unlink()

    def fail(self: Trainer, iteration: int) -> None:
        raise AssertionError(f"iteration {iteration} was trained already")

    monkeypatch.setattr(Trainer, "iterate", fail)

    assert main(["train", "--config", str(recipe), "--run-dir", str(uninterrupted)]) == 0
    assert read_result(uninterrupted) == expected


def test_a_run_without_a_usable_checkpoint_does_not_begin_anew(
    recipe: Path, uninterrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    (run_dir / "result.json").unlink()
    for state in run_dir.glob("checkpoints/*/state.json"):
        state.write_text("{}")
    before = (run_dir / "metrics.jsonl").read_bytes()

    with pytest.warns(UserWarning, match="skipped, state.json has 2 bytes"):
        assert main(["train", "--config", str(recipe), "--run-dir", str(run_dir)]) == 2

    assert "/checkpoints: none of the checkpoints can be used (see the warnings)" in capsys.readouterr().err
    assert (run_dir / "metrics.jsonl").read_bytes() == before
