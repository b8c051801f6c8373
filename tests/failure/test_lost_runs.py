"""Runs that lose a rank: they end with one line, and go on from the last checkpoint with other ranks."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from mlomae.arguments import EXIT_LOST, EXIT_USER_ERROR
from tests.distributed.ranks import free_port
from tests.integration.tiny import FEW_TO_FIT, read_metrics, tiny_config, train, write_recipe

pytestmark = [pytest.mark.dist, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
TRAIN, DIES = ROOT / "train.py", Path(__file__).with_name("dies.py")
TIMEOUT = 240
ITERATIONS, DEATH = 12, 7
FIELDS = {**FEW_TO_FIT, "iterations": ITERATIONS}
LOSSES = ("loss/pretrain", "loss/head", "loss/mask")
LOST = re.compile(
    r"mlomae: error: rank 1 on \S+ is lost: the process ended without a word; last seen [\w /,]+; "
    "start again to resume from the last checkpoint"
)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("lost") / "tiny.yaml", FIELDS)


@pytest.fixture(scope="module")
def whole(recipe: Path) -> list[dict[str, Any]]:
    """The metrics of a run that nothing happens to."""
    run_dir = recipe.parent / "whole"
    train(tiny_config({**FIELDS, "run_dir": run_dir}))
    return read_metrics(run_dir)


def start(program: list[str], recipe: Path, run_dir: Path, **variables: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, *program, "--config", str(recipe), "--run-dir", str(run_dir)],
        env={**environment, "OMP_NUM_THREADS": "1", **variables}, cwd=recipe.parent, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finish(*processes: subprocess.Popen[str]) -> list[tuple[int, str]]:
    """Exit code and stderr of each; all that they have started is dead then."""
    try:
        said = [process.communicate(timeout=TIMEOUT)[1] for process in processes]
        return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def meet(end: str, recipe: Path, run_dir: Path) -> list[tuple[int, str]]:
    """Runs two ranks, the second of which meets its end."""
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    program = [str(DIES), end, str(DEATH)]
    return finish(*(start(program, recipe, run_dir, RANK=rank, LOCAL_RANK=rank, **world) for rank in "01"))


def assert_equals_whole(run_dir: Path, whole: list[dict[str, Any]]) -> None:
    found = read_metrics(run_dir)
    assert [row["step"] for row in found] == list(range(1, ITERATIONS + 1))
    for row, expected in zip(found, whole, strict=True):
        assert [row[name] for name in LOSSES] == pytest.approx([expected[name] for name in LOSSES], abs=1e-5)


def test_a_killed_rank_ends_the_run_and_one_process_finishes_it(
    recipe: Path, whole: list[dict[str, Any]], tmp_path: Path
) -> None:
    (code, said), (killed, _) = meet("killed", recipe, tmp_path / "run")
    assert (code, killed) == (EXIT_LOST, -signal.SIGKILL), said
    assert LOST.fullmatch(said.strip())
    assert read_metrics(tmp_path / "run")[-1]["step"] < ITERATIONS

    assert finish(start([str(TRAIN)], recipe, tmp_path / "run")) == [(0, "")]
    assert_equals_whole(tmp_path / "run", whole)


def test_where_one_rank_has_no_memory_all_say_so_with_its_exit_code(recipe: Path, tmp_path: Path) -> None:
    (code, said), (own, line) = meet("memory", recipe, tmp_path / "run")
    assert (code, own) == (EXIT_USER_ERROR, EXIT_USER_ERROR), said
    assert re.fullmatch(r"mlomae: error: out of memory in \S+ of iteration 6: .*\n", line), line
    assert re.fullmatch(
        r"mlomae: error: rank 1 on \S+ has stopped: out of memory in \S+ of iteration 6: .*\n", said
    ), said


def test_torchrun_restarts_by_itself(recipe: Path, whole: list[dict[str, Any]], tmp_path: Path) -> None:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "2"]
    ((code, said),) = finish(start([*launcher, str(DIES), "killed", str(DEATH)], recipe, tmp_path / "run"))
    assert code == 0, said
    assert len(LOST.findall(said)) == 1
    assert_equals_whole(tmp_path / "run", whole)
