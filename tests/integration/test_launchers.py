"""The commands of the README: deepspeed with one and two ranks, and torchrun, equal plain python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks import free_port
from tests.integration.tiny import FEW_TO_FIT, read_metrics, read_result, write_recipe

pytestmark = [pytest.mark.dist, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 240
ZERO1 = ["--deepspeed_config", str(ROOT / "ds_configs" / "zero1.json")]
DEEPSPEED = str(Path(sys.executable).with_name("deepspeed"))
LAUNCHERS: dict[str, tuple[list[str], list[str]]] = {
    "deepspeed": ([DEEPSPEED, "--num_gpus", "1", "--master_port", "PORT"], ZERO1),
    "deepspeed-2": ([DEEPSPEED, "--num_gpus", "2", "--master_port", "PORT"], ZERO1),
    "torchrun-2": (
        [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "PORT"],
        [],
    ),
}


def run(
    launcher: list[str], recipe: Path, run_dir: Path, options: list[str]
) -> subprocess.CompletedProcess[str]:
    command = [word.replace("PORT", str(free_port())) for word in launcher]
    arguments = [*options, "--config", str(recipe), "--run-dir", str(run_dir)]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [*command, str(ROOT / "train.py"), *arguments],
        env={**environment, "OMP_NUM_THREADS": "1"}, cwd=recipe.parent,
        capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    fields = {**FEW_TO_FIT, "iterations": 6, "log_every": 2}
    return write_recipe(tmp_path_factory.mktemp("launchers") / "tiny.yaml", fields)


@pytest.fixture(scope="module")
def plain(recipe: Path) -> Path:
    run_dir = recipe.parent / "plain"
    done = run([sys.executable], recipe, run_dir, [])
    assert (done.returncode, done.stderr) == (0, "")
    return run_dir


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launched_runs_equal_plain_python(name: str, recipe: Path, plain: Path, tmp_path: Path) -> None:
    launcher, options = LAUNCHERS[name]

    done = run(launcher, recipe, tmp_path / "run", options)

    assert done.returncode == 0, done.stdout + done.stderr
    found, expected = read_metrics(tmp_path / "run"), read_metrics(plain)
    assert [row["step"] for row in found] == [row["step"] for row in expected] == [2, 4, 6]
    for row, wanted in zip(found, expected, strict=True):
        assert losses(row) == pytest.approx(losses(wanted), abs=1e-5)
    result, wanted_result = read_result(tmp_path / "run"), read_result(plain)
    # One test image may be on the other side of a boundary.
    assert result == pytest.approx(wanted_result, abs=0.01)
    # Of several ranks, one speaks.
    assert done.stdout.count("step 2/6 ") == 1
    assert done.stdout.count("knn_accuracy: ") == 1
    assert json.loads((tmp_path / "run" / "result.json").read_text())["iterations"] == 6


def losses(row: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name.startswith("loss/")}


def test_bad_input_stops_all_ranks(recipe: Path, tmp_path: Path) -> None:
    launcher, options = LAUNCHERS["torchrun-2"]

    done = run(launcher, recipe, tmp_path / "run", [*options, "--head.batch_size", "9"])

    assert done.returncode != 0
    assert "mlomae: error: head.batch_size: 9 is not divisible by the 2 ranks; use a multiple" in done.stderr
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in done.stderr
    assert not (tmp_path / "run").exists()
