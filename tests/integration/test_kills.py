"""Thirty kills at random moments, also while checkpoints are written: the run ends as if undisturbed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.integration.tiny import FEW_TO_FIT, read_metrics, write_recipe

ROOT = Path(__file__).resolve().parents[2]
ITERATIONS = 500
SCHEDULE = {
    **FEW_TO_FIT,
    "iterations": ITERATIONS,
    "log_every": 7,
    "checkpoint_every": 3,
    "picture_every": 10**6,
    "data.augment": "shift",
}


def run(*command: str | Path) -> str:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_survives_thirty_kills(tmp_path: Path) -> None:
    recipe = write_recipe(tmp_path / "tiny.yaml", SCHEDULE)
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"

    run("-m", "tests.integration.killed_run", recipe, killed)
    run(ROOT / "train.py", "--config", recipe, "--run-dir", undisturbed)

    assert read_metrics(killed) == read_metrics(undisturbed)
    last = f"checkpoints/step-{ITERATIONS:08d}"
    for name in ("encoder.safetensors", f"{last}/encoder.safetensors", f"{last}/training.safetensors"):
        found, expected = load_file(killed / name), load_file(undisturbed / name)
        assert found.keys() == expected.keys()
        assert [key for key, tensor in expected.items() if not found[key].equal(tensor)] == []
