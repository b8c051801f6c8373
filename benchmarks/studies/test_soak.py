"""Does a long run wear out? Memory, open files and speed of one over 50,000 tiny outer iterations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import linear_regression, median

import pytest

from benchmarks.environment import ROOT
from benchmarks.process_memory import memory_of, skip_without_accounts
from benchmarks.report import Bar, Report
from tests.integration.tiny import FEW_TO_FIT, write_recipe

pytestmark = pytest.mark.study

ITERATIONS, SAMPLES = 50_000, 100
# The first picture, after a tenth, loads matplotlib, which keeps its fonts open.
WARM_UP = 0.15
# Of everything that happens in a run, as often as there is time for.
LOG_EVERY, CHECKPOINT_EVERY, PICTURE_EVERY = 10, 1_000, 5_000
MAX_GROWTH = 1.0  # MiB per 10,000 iterations
MAX_DRIFT = 0.03


@dataclass(frozen=True)
class Sample:
    """What a process has and has used when its log reached an iteration."""

    iteration: int
    memory_mib: float
    open_files: int
    cpu_seconds: float
    wall_seconds: float


def test_soak(request: pytest.FixtureRequest, report: Report, smoke: list[str], work_dir: Path) -> None:
    skip_without_accounts()
    iterations = request.config.getoption("iterations") or ITERATIONS
    samples = list(_run(work_dir / "soak", iterations))
    speeds = [
        {
            "iterations": f"{former.iteration:,} to {latter.iteration:,}",
            "CPU ms": 1000 * _per_iteration(former, latter, lambda sample: sample.cpu_seconds),
            "wall ms": 1000 * _per_iteration(former, latter, lambda sample: sample.wall_seconds),
        }
        for former, latter in pairwise(samples[:: max(1, len(samples) // 10)])
    ]
    report.table(
        "samples",
        [
            {
                "iteration": sample.iteration,
                "memory, MiB": sample.memory_mib,
                "open files": sample.open_files,
            }
            for sample in samples[:: max(1, len(samples) // 20)]
        ],
    )
    report.table("time of an iteration, with log lines, checkpoints and pictures", speeds)
    if not smoke:
        report.check(*_bars([sample for sample in samples if sample.iteration >= WARM_UP * iterations]))


def _run(run_dir: Path, iterations: int) -> Iterator[Sample]:
    """Trains, and looks at the process about ``SAMPLES`` times."""
    fields = FEW_TO_FIT | {
        "iterations": iterations,
        "log_every": LOG_EVERY,
        "checkpoint_every": CHECKPOINT_EVERY,
        "picture_every": PICTURE_EVERY,
        "eval.pixels": False,
        "loggers": ["tensorboard"],
    }
    run_dir.parent.mkdir(parents=True, exist_ok=True)
    recipe = write_recipe(run_dir.with_suffix(".yaml"), fields)
    command = [sys.executable, "train.py", "--config", str(recipe), "--run-dir", str(run_dir), "--quiet"]
    # One thread: tensors so small are not worth a second one, which would wait for its core.
    settings = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=ROOT, env=settings) as process:
        started, seen = time.perf_counter(), 0
        while process.poll() is None and seen < iterations:
            time.sleep(0.05)
            iteration = _last_iteration(run_dir / "metrics.jsonl")
            if iteration - seen < iterations / SAMPLES:
                continue
            seen = iteration
            yield Sample(
                iteration,
                memory_of([process.pid]),
                len(os.listdir(f"/proc/{process.pid}/fd")),
                _cpu_seconds(process.pid),
                time.perf_counter() - started,
            )
    assert process.returncode == 0


def _last_iteration(log: Path) -> int:
    if not log.exists():
        return 0
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 8192))
        whole_lines = file.read().rpartition(b"\n")[0]
    last = whole_lines.rpartition(b"\n")[2]
    return int(json.loads(last)["step"]) if last else 0


def _cpu_seconds(process: int) -> float:
    """User and system time of all its threads."""
    ticks = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def _per_iteration(former: Sample, latter: Sample, seconds: Callable[[Sample], float]) -> float:
    return (seconds(latter) - seconds(former)) / (latter.iteration - former.iteration)


def _bars(samples: list[Sample]) -> list[Bar]:
    """Of samples after the warm-up. Speed is CPU time: the wall clock counts what else the machine does."""
    slope = linear_regression(
        [sample.iteration / 10_000 for sample in samples], [sample.memory_mib for sample in samples]
    ).slope
    times = [
        _per_iteration(former, latter, lambda sample: sample.cpu_seconds)
        for former, latter in pairwise(samples)
    ]
    fifth = len(times) // 5
    drift = median(times[-fifth:]) / median(times[:fifth]) - 1
    # The least of a while: a checkpoint that is being written has files open.
    opened = [sample.open_files for sample in samples]
    growth = min(opened[-fifth:]) - min(opened[:fifth])
    return [
        Bar("memory, MiB per 10,000 iterations", slope, "<", MAX_GROWTH),
        Bar("open files more at the end", growth, "<=", 0),
        Bar("CPU time of an iteration: last fifth to first fifth - 1", drift, "<", MAX_DRIFT),
    ]
