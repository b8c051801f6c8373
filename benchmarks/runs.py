"""Training runs as a user starts them: ``train.py`` with the digits recipe in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.environment import ROOT

RECIPE = "recipes/digits.yaml"
# Far above any bar: ends a run that hangs.
_TIMEOUT_S = 3600


@dataclass(frozen=True)
class Run:
    """``result``: content of result.json; ``wall_seconds``: the whole command, evaluation included."""

    result: dict[str, Any]
    wall_seconds: float


def train(run_dir: Path, *overrides: str, recipe: str = RECIPE) -> Run:
    """Runs a recipe to its end on the CPU; an unfinished run resumes, a complete one is only read."""
    command = [sys.executable, "train.py", "--config", recipe, "--run-dir", str(run_dir), *overrides]
    # Without a visible GPU the command stays the documented one and the figures stay CPU figures.
    settings = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    started = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=_TIMEOUT_S)
    wall_seconds = time.perf_counter() - started
    if done.returncode:
        pytest.fail(f"{' '.join(command[1:])} exited with {done.returncode}:\n{done.stderr[-2000:]}")
    return Run(json.loads((run_dir / "result.json").read_text()), wall_seconds)
