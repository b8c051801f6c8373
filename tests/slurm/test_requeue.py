"""After an attempt: which ends are worth another one, and when there have been enough."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mlomae.slurm.requeue import Attempt, main, newest_step, read_attempts, without_progress
from tests.integration.tiny import write_recipe


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run directory in which training has begun."""
    path = tmp_path / "run"
    path.mkdir()
    (path / "config.yaml").write_text("{}")
    return path


@pytest.fixture
def requeued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that receives the ids of the jobs that a stand-in of scontrol requeues."""
    calls = tmp_path / "calls"
    program = tmp_path / "bin" / "scontrol"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\n[ "$1" = requeue ] && echo "$2" >> {calls}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    for name in ("SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    calls.touch()
    return calls


def checkpoint(run_dir: Path, step: int, finished: bool = True) -> None:
    folder = run_dir / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    if finished:
        (folder / "manifest.json").touch()


def end(run_dir: Path, code: int, *options: str) -> int:
    recipe = write_recipe(run_dir.parent / "tiny.yaml", {})
    return main(
        ["--code", str(code), *options, "--", "--config", str(recipe), "--run-dir", str(run_dir)],
    )


@pytest.mark.parametrize("code", [75, 76, 137, 143])
def test_stopped_lost_and_killed_runs_get_another_attempt(run_dir: Path, requeued: Path, code: int) -> None:
    checkpoint(run_dir, 4)
    assert end(run_dir, code) == code
    assert requeued.read_text() == "12\n"
    assert read_attempts(run_dir / "attempts.jsonl") == [Attempt("12", 0, code, 4)]


def test_finished_run_is_recorded_without_a_word(
    run_dir: Path, requeued: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end(run_dir, 0) == 0
    assert requeued.read_text() == ""
    assert capsys.readouterr() == ("", "")
    assert [attempt.code for attempt in read_attempts(run_dir / "attempts.jsonl")] == [0]


@pytest.mark.parametrize("code", [1, 2, 130])
def test_errors_are_not_repeated(
    run_dir: Path, requeued: Path, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end(run_dir, code) == code
    assert requeued.read_text() == ""
    expected = f"mlomae: error: job 12: not requeued: exit code {code} would come again\n"
    assert capsys.readouterr().err == expected


def test_cancelled_job_stays_cancelled(
    run_dir: Path, requeued: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert end(run_dir, 75, "--ended") == 75
    assert requeued.read_text() == ""
    assert "cancelled" in capsys.readouterr().err


def test_third_attempt_without_a_checkpoint_is_the_last(
    run_dir: Path, requeued: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for step in (4, 8):
        checkpoint(run_dir, step)
        end(run_dir, 75)
    end(run_dir, 76)
    end(run_dir, 75)
    assert requeued.read_text() == "12\n" * 4
    capsys.readouterr()
    assert end(run_dir, 137) == 137
    assert requeued.read_text() == "12\n" * 4
    (line,) = capsys.readouterr().err.splitlines()
    assert "3 attempts in a row ended without a new checkpoint, the last with exit code 137" in line


def test_job_that_never_claims_its_directory_stops_too(
    tmp_path: Path, requeued: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for restart in ("0", "1", "2"):
        monkeypatch.setenv("SLURM_RESTART_COUNT", restart)
        end(tmp_path / "absent", 139)
    assert requeued.read_text() == "12\n" * 2
    # The folder is left for the run to claim: a file in it would make it somebody else's.
    assert not (tmp_path / "absent").exists()


def test_task_of_an_array_is_requeued_alone(
    run_dir: Path, requeued: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The last task's own id is the one of the whole array.
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "12")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    end(run_dir, 75)
    assert requeued.read_text() == "12_3\n"
    assert read_attempts(run_dir / "attempts.jsonl")[0].job == "12_3"


def test_refusal_of_slurm_is_one_line(
    run_dir: Path, requeued: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin" / "scontrol").write_text("#!/bin/sh\necho 'Requeue is\ndisabled' >&2; exit 1\n")
    assert end(run_dir, 75) == 75
    assert capsys.readouterr().err == "mlomae: error: job 12: not requeued: Requeue is disabled\n"


def test_attempts_of_an_earlier_job_do_not_count() -> None:
    earlier = [Attempt("11", restart, 76, 4) for restart in range(3)]
    assert without_progress(earlier, "11") == 2
    assert without_progress([*earlier, Attempt("12", 0, 76, 4)], "12") == 1
    assert without_progress([*earlier, Attempt("12", 0, 76, 6)], "12") == 0


def test_unfinished_checkpoint_is_no_progress(run_dir: Path) -> None:
    assert newest_step(run_dir) == 0
    checkpoint(run_dir, 4)
    checkpoint(run_dir, 6, finished=False)
    assert newest_step(run_dir) == 4


def test_line_cut_short_is_passed_over(run_dir: Path, requeued: Path) -> None:
    end(run_dir, 75)
    with open(run_dir / "attempts.jsonl", "a") as file:
        file.write('{"job": "1')
    end(run_dir, 76)
    assert [attempt.code for attempt in read_attempts(run_dir / "attempts.jsonl")] == [75, 76]


def test_decision_needs_no_torch() -> None:
    code = "import sys, json, mlomae.slurm.requeue, mlomae.cli; print(json.dumps('torch' in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False
