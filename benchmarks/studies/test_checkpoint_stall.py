"""What a checkpoint costs a run: how long training stands still, and how it slows down during the writing.

A cycle of outer iterations with a save at its beginning takes turns with one without. The writing thread
shares the cores with training here; beside a GPU it does not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.problem import CYCLES, configure, write_images
from benchmarks.report import Bar, Report, Row
from benchmarks.timing import interleaved, median_ratio
from mlomae import checkpoint
from mlomae.distributed.env import join_world
from mlomae.run_dir import RunDir
from mlomae.trainer import Trainer

pytestmark = pytest.mark.study

ROUNDS, WARM_UP = 3, 1
MAX_STALL = 0.05  # of an outer iteration
GIB = 2**30


class Runner:
    """Cycles of a trainer's outer iterations, with and without a checkpoint.

    Attributes:
        stalls: seconds of each ``Trainer.save``.
        writes: seconds of each write in the background.
    """

    def __init__(self, trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
        self._trainer = trainer
        self.stalls: list[float] = []
        self.writes: list[float] = []
        monkeypatch.setattr(checkpoint, "save", _timed(checkpoint.save, self.writes))

    def quiet(self) -> None:
        for _ in range(CYCLES["default"]):
            self._trainer.iterate(self._trainer.iteration)
            self._trainer.iteration += 1

    def saving(self) -> None:
        _timed(self._trainer.save, self.stalls)()
        self.quiet()

    def finish(self) -> None:
        """Ends a write that took longer than its cycle."""
        self._trainer.writer.finish()


def _timed(function: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        result = function(*args, **kwargs)
        seconds.append(time.perf_counter() - started)
        return result

    return timed


def test_checkpoint_stall(
    request: pytest.FixtureRequest,
    report: Report,
    smoke: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    rounds = max(1, request.config.getoption("iterations")) if smoke else ROUNDS
    # Batches of eight: the recipe's 1024 make an iteration longer and the checkpoint no larger.
    size = "tiny" if smoke else "vit-b16"
    write_images(tmp_path / "images")
    config = configure(size, "token", tmp_path / "images")
    trainer = Trainer(config, RunDir(tmp_path / "run", config), join_world("cpu"), None)
    runner = Runner(trainer, monkeypatch)

    cycles = interleaved(
        {"quiet": runner.quiet, "saving": runner.saving},
        rounds,
        WARM_UP,
        before={"quiet": runner.finish, "saving": runner.finish},
    )
    runner.finish()

    found = checkpoint.newest(trainer.run_dir.checkpoints)
    assert found is not None
    iteration = statistics.median(cycles["quiet"]) / CYCLES["default"]
    stall, write = (statistics.median(values[-rounds:]) for values in (runner.stalls, runner.writes))
    row: Row = {
        "checkpoint, GiB": sum(path.stat().st_size for path in found.iterdir()) / GIB,
        "outer iteration, s": iteration,
        "stall, s": stall,
        "stall / iteration": stall / iteration,
        "written in, s": write,
        "cycle with a save / cycle without": median_ratio(cycles["saving"], cycles["quiet"]),
    }
    batch, cycle = config.pretrain.batch_size, CYCLES["default"]
    report.table(f"{size}, batches of {batch}, {rounds} cycles of {cycle} iterations, on the CPU", [row])
    if not smoke:
        report.check(Bar("stall in outer iterations", stall / iteration, "<=", MAX_STALL))
