"""What ``import mlomae`` adds to ``import torch``, each in a fresh interpreter."""

from __future__ import annotations

import statistics
import subprocess
import sys

import pytest

from benchmarks.environment import ROOT
from benchmarks.report import Bar, Report

pytestmark = pytest.mark.study

ROUNDS = 7
# mlomae.run is what ``mlomae train`` loads: shown beside the bar, which is on the package alone.
MODULES = ("torch", "mlomae", "mlomae.run")


def _import_seconds(module: str) -> float:
    code = (
        f"import time; started = time.perf_counter(); import {module}; print(time.perf_counter() - started)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def test_import_time(report: Report) -> None:
    for module in MODULES:
        _import_seconds(module)  # fills the disk cache and writes byte code
    # Alternating, so that a change in the machine's load meets all of them.
    rounds = [{module: _import_seconds(module) for module in MODULES} for _ in range(ROUNDS)]
    beyond_torch = {
        module: statistics.median(seconds[module] - seconds["torch"] for seconds in rounds)
        for module in MODULES
    }
    report.table(
        f"import time in seconds, medians of {ROUNDS} alternating rounds",
        [
            {
                "import": module,
                "seconds": statistics.median(seconds[module] for seconds in rounds),
                "more than torch": beyond_torch[module],
            }
            for module in MODULES
        ],
    )
    report.check(Bar("import mlomae beyond import torch, s", beyond_torch["mlomae"], "<", 0.3))
