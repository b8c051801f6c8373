"""The job scripts on a real Slurm, with a stand-in for the training: when jobs are requeued, and when not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mlomae.slurm import scripts_folder
from tests.integration.tiny import write_recipe
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slow, pytest.mark.dist]

Submit = Callable[..., str]


@pytest.fixture
def submit(cluster: Cluster, python: Path, tmp_path: Path) -> Submit:
    """Submits by hand a job whose ranks run a piece of shell; returns the job's id."""
    recipe = write_recipe(tmp_path / "tiny.yaml", {})

    def run(train: str, *options: str, script: str = "one_node", arguments: tuple[str, ...] = ()) -> str:
        (tmp_path / "train.sh").write_text(train)
        words = [*options, "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1", "--output=log"]
        target = [str(scripts_folder() / f"{script}.sbatch"), *arguments, "--config", recipe]
        if script != "sweep":
            target += ["--run-dir", "run"]
        return cluster.run(
            "env", f"MLOMAE_PYTHON={python}", "sbatch", "--parsable", *words, *target, cwd=tmp_path
        ).strip()

    return run


def log(tmp_path: Path) -> str:
    path = tmp_path / "log"
    return path.read_text() if path.exists() else ""


def test_ranks_meet_at_the_first_node(cluster: Cluster, submit: Submit, tmp_path: Path) -> None:
    job = submit(
        'echo "rank $SLURM_PROCID of $SLURM_STEP_NUM_TASKS at $MASTER_ADDR: $*"',
        "--nodes=2",
        script="many_nodes",
    )
    assert cluster.finish(job)["JobState"] == "COMPLETED"
    # The names of the nodes do not resolve here, the address by which Slurm knows them does.
    arguments = f"--config {tmp_path / 'tiny.yaml'} --run-dir run"
    expected = [f"rank {rank} of 2 at 127.0.0.1: {arguments}" for rank in (0, 1)]
    assert sorted(log(tmp_path).splitlines()) == expected


def test_job_without_progress_stops(cluster: Cluster, submit: Submit, tmp_path: Path) -> None:
    job = submit("exit 76")
    cluster.release(job, restarts=1)
    cluster.release(job, restarts=2)
    ended = cluster.finish(job)
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "2", "76:0")
    last = log(tmp_path).splitlines()[-1]
    assert last.startswith(f"mlomae: error: job {job}: not requeued: 3 attempts in a row ended without a new")


def test_user_error_ends_the_job(cluster: Cluster, submit: Submit, tmp_path: Path) -> None:
    ended = cluster.finish(submit("exit 2"))
    assert (ended["JobState"], ended["Restarts"], ended["ExitCode"]) == ("FAILED", "0", "2:0")
    assert "not requeued: exit code 2 would come again" in log(tmp_path)


def test_cancelled_job_saves_and_stays_cancelled(cluster: Cluster, submit: Submit, tmp_path: Path) -> None:
    job = submit("trap 'echo saved; exit 75' TERM; echo up; sleep 100 & wait")
    cluster.wait_for("training has begun", lambda: "up" in log(tmp_path))
    cluster.run("scancel", job)
    ended = cluster.finish(job)
    assert (ended["JobState"], ended["Restarts"]) == ("CANCELLED", "0")
    cluster.wait_for("the batch script has ended", lambda: "Slurm has ended it" in log(tmp_path))
    assert "saved" in log(tmp_path)


def test_signal_to_the_whole_job_is_survived_by_its_shell(
    cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    job = submit(
        "[ $SLURM_RESTART_COUNT ] && exit; trap 'echo saved; exit 75' USR1; echo up; sleep 100 & wait"
    )
    cluster.wait_for("training has begun", lambda: "up" in log(tmp_path))
    cluster.run("scancel", "--full", "--signal=USR1", job)
    cluster.release(job, restarts=1)
    assert cluster.finish(job)["JobState"] == "COMPLETED"
    assert f"job {job}: requeued after exit code 75" in log(tmp_path)


def test_job_is_started_again_after_a_node_failed(cluster: Cluster, submit: Submit, tmp_path: Path) -> None:
    job = submit("[ $SLURM_RESTART_COUNT ] && exit; echo up; sleep 100", "--nodes=2", script="many_nodes")
    cluster.wait_for("training has begun", lambda: log(tmp_path).count("up") == 2)
    try:
        cluster.run("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
        cluster.wait_for("Slurm has requeued the job", lambda: cluster.job(job)["JobState"] == "PENDING")
    finally:
        cluster.run("scontrol", "update", "NodeName=n2", "State=RESUME")
    cluster.release(job, restarts=1)
    assert cluster.finish(job)["JobState"] == "COMPLETED"


def test_tasks_of_an_array_are_requeued_on_their_own(
    cluster: Cluster, submit: Submit, tmp_path: Path
) -> None:
    (tmp_path / "sweep.txt").write_text("# seeds\n--seed 1\n\n--seed 2 --masking.hidden '4 '\n")
    preempted = '[ "$SLURM_ARRAY_TASK_ID" = 2 ] && [ ! $SLURM_RESTART_COUNT ] && exit 75'
    job = submit(
        f"{preempted}; printf '<%s>' \"$@\"; echo",
        "--array=1-2",
        script="sweep",
        arguments=("sweep.txt", "runs"),
    )
    # The last task has the array's own id: requeued by it, the first would run again as well.
    cluster.release(f"{job}_2", restarts=1)
    for task, restarts in (("1", "0"), ("2", "1")):
        ended = cluster.finish(f"{job}_{task}")
        assert (ended["JobState"], ended["Restarts"]) == ("COMPLETED", restarts)
    shared = f"<--config><{tmp_path / 'tiny.yaml'}>"
    lines = [line for line in log(tmp_path).splitlines() if line.startswith("<")]
    assert sorted(lines) == [
        f"{shared}<--run-dir><runs{os.sep}1><--seed><1>",
        f"{shared}<--run-dir><runs{os.sep}2><--seed><2><--masking.hidden><4 >",
    ]


def test_more_tasks_than_gpus_are_refused(cluster: Cluster, tmp_path: Path, python: Path) -> None:
    (tmp_path / "train.sh").write_text("echo trained")
    # Slurm itself would refuse GPUs here, so the batch script runs outside of it.
    tasks = {"SLURM_GPUS_PER_NODE": "h100:8", "SLURM_NTASKS_PER_NODE": "1", "MLOMAE_PYTHON": str(python)}
    words = [f"{name}={value}" for name, value in tasks.items()]
    with pytest.raises(AssertionError, match="--ntasks-per-node: found 1, expected 8, one task per GPU"):
        cluster.run("env", *words, scripts_folder() / "one_node.sbatch")
