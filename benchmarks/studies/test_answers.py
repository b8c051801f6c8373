"""How soon the command line answers: its help, and the report of a run with 10,000 log lines."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.environment import ROOT
from benchmarks.report import Bar, Report
from tests.report.made import Made, make_run

pytestmark = pytest.mark.study

ROUNDS = 7
LOGGED, PICTURED = 10_000, 100


def _seconds(*words: str) -> float:
    command = [sys.executable, "-m", "mlomae", *words]
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    return time.perf_counter() - started


def test_answers(report: Report, tmp_path: Path) -> None:
    # A line and a picture as large as those of a ViT-B/16 at 224 pixels.
    run = make_run(tmp_path / "run", Made(side=224, patch=16, logged=LOGGED, every=1, pictured=PICTURED))
    page = tmp_path / "report.html"
    commands = {"mlomae --help": ("--help",), "mlomae report": ("report", str(run), "--out", str(page))}
    for words in commands.values():
        _seconds(*words)  # fills the disk cache and writes byte code
    rounds = [{name: _seconds(*words) for name, words in commands.items()} for _ in range(ROUNDS)]
    medians = {name: statistics.median(seconds[name] for seconds in rounds) for name in commands}
    report.table(
        f"seconds of whole commands, medians of {ROUNDS} alternating rounds; a run of {LOGGED:,} iterations, "
        f"each logged, and {PICTURED} pictures",
        [{"command": name, "seconds": seconds} for name, seconds in medians.items()],
    )
    report.check(
        Bar("mlomae --help, s", medians["mlomae --help"], "<", 0.5),
        Bar("report, s", medians["mlomae report"], "<", 5.0),
        Bar("report, MB", page.stat().st_size / 1e6, "<", 5.0),
    )
