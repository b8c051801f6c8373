"""Whole runs under a real Slurm, from ``mlomae submit`` to the result: preempted, killed, and in an array.

docs/slurm_run.txt is the log of the preempted run:

    MLOMAE_SLURM_LOG=docs/slurm_run.txt pytest tests/slurm/test_cluster.py -k preempted
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlomae.slurm.requeue import read_attempts
from tests.integration.tiny import FEW_TO_FIT, Fields, read_metrics, read_result, write_recipe
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.dist]

ITERATIONS = 30
ON_CPUS = ("--gpus-per-node", "0", "--cpus-per-task", "1")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of the same run in a single process that nobody disturbs."""
    folder = tmp_path_factory.mktemp("alone")
    recipe = write_recipe(folder / "tiny.yaml", {**FEW_TO_FIT, "iterations": ITERATIONS})
    command = [sys.executable, "-m", "mlomae", "train", "--config", recipe, "--run-dir", folder / "run"]
    subprocess.run(command, check=True, capture_output=True)
    return folder / "run"


def submit(cluster: Cluster, folder: Path, fields: Fields, *options: str) -> str:
    """Submits the tiny run, with some fields changed, from ``folder``; returns the job's id."""
    run = {**FEW_TO_FIT, "iterations": ITERATIONS, "run_dir": "run", **fields}
    recipe = write_recipe(folder / "tiny.yaml", run)
    words = [sys.executable, "-m", "mlomae", "submit", recipe, *ON_CPUS, *options]
    return cluster.run(*words, cwd=folder).removeprefix("job: ").strip()


def steps_done(run_dir: Path) -> int:
    path = run_dir / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def losses(run_dir: Path) -> dict[int, tuple[float, ...]]:
    names = ("loss/pretrain", "loss/head", "loss/mask")
    return {row["step"]: tuple(row[name] for name in names) for row in read_metrics(run_dir)}


def assert_same_run(run_dir: Path, expected: Path) -> None:
    found, wanted = losses(run_dir), losses(expected)
    assert found.keys() == wanted.keys()
    for step, values in wanted.items():
        assert found[step] == pytest.approx(values, rel=1e-5, abs=1e-5), step
    assert read_result(run_dir).keys() == read_result(expected).keys()


def keep_log(cluster: Cluster, job: str, log: Path) -> None:
    """Writes what a reader of the documentation may see: the log of the job, and what Slurm says of it."""
    target = os.environ.get("MLOMAE_SLURM_LOG")
    if not target:
        return
    parts = {
        "mlomae submit tiny.yaml --nodes 2 --gpus-per-node 0 --cpus-per-task 1": f"job: {job}\n",
        f"cat mlomae-{job}.log": log.read_text(),
        f"scontrol show job {job}": cluster.run("scontrol", "show", "job", job).strip() + "\n",
        "sinfo": cluster.run("sinfo"),
        "cat run/attempts.jsonl": (log.parent / "run" / "attempts.jsonl").read_text(),
    }
    text = "\n".join(f"$ {command}\n{output}" for command, output in parts.items())
    folders = {str(log.parent): ".", str(Path(__file__).parents[2]): "mlomae", os.uname().nodename: "host"}
    for found, shown in folders.items():
        text = text.replace(found, shown)
    Path(target).write_text(re.sub(r"[ \r]+$", "", text, flags=re.MULTILINE))


def test_preempted_run_goes_on_by_itself(cluster: Cluster, alone: Path, tmp_path: Path) -> None:
    job = submit(cluster, tmp_path, {"checkpoint_every": 1000}, "--nodes", "2")
    run, log = tmp_path / "run", tmp_path / f"mlomae-{job}.log"
    cluster.wait_for("the run trains", lambda: steps_done(run) >= 3)
    cluster.run("scancel", "--signal=USR1", job)
    cluster.release(job, restarts=1)
    (first,) = read_attempts(run / "attempts.jsonl")
    # No checkpoint was due: the one that is there was written because of the signal.
    assert (first.job, first.restart, first.code) == (job, 0, 75)
    assert 3 <= first.step < ITERATIONS
    assert cluster.finish(job)["JobState"] == "COMPLETED"
    assert [attempt.code for attempt in read_attempts(run / "attempts.jsonl")] == [75, 0]
    assert f"job {job}: requeued after exit code 75; goes on from step {first.step}" in log.read_text()
    assert_same_run(run, alone)
    keep_log(cluster, job, log)


def test_run_survives_a_killed_task(cluster: Cluster, alone: Path, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"checkpoint_every": 2, "failure.lost_after": 10}
    job = submit(cluster, tmp_path, fields, "--nodes", "2")
    run = tmp_path / "run"
    cluster.wait_for("the run trains", lambda: steps_done(run) >= 3)
    (task,) = cluster.processes("mlomae train", SLURM_JOB_ID=job, SLURM_PROCID="1")
    os.kill(task, signal.SIGKILL)
    cluster.release(job, restarts=1)
    (first,) = read_attempts(run / "attempts.jsonl")
    assert (first.job, first.code) == (job, 137)
    assert cluster.finish(job)["JobState"] == "COMPLETED"
    assert_same_run(run, alone)


def test_array_trains_each_line_of_a_file(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "sweep.txt").write_text("# two seeds\n--seed 1 --iterations 2\n--seed 2 --iterations 3\n")
    job = submit(cluster, tmp_path, {}, "--sweep", "sweep.txt", "--job-name", "seeds")
    for task, iterations in (("1", 2), ("2", 3)):
        assert cluster.finish(f"{job}_{task}")["JobState"] == "COMPLETED"
        result = json.loads((tmp_path / "run" / task / "result.json").read_text())
        assert (result["seed"], result["iterations"]) == (int(task), iterations)
        assert (tmp_path / f"seeds-{job}_{task}.log").exists()
