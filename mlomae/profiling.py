"""``mlomae profile``: where the time of an outer iteration goes, measured by torch's profiler."""

from __future__ import annotations

import gc
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, schedule

from mlomae.compilation import resolve_execution
from mlomae.config import Config
from mlomae.distributed.engine import Engine
from mlomae.distributed.env import join_world, leave_world
from mlomae.errors import UserError
from mlomae.profile_times import (
    KindTime,
    OperatorTime,
    PartTime,
    kind_times,
    operator_times,
    part_flops,
    part_times,
)
from mlomae.profile_trace import ITERATION, Reading, read_trace
from mlomae.ranges import profiled
from mlomae.run_dir import RunDir
from mlomae.telemetry import Telemetry
from mlomae.trainer import Trainer

NUM_OPERATORS = 10
MIN_SECONDS = 1.0
"""That speed is measured for, without the profiler."""
# Rounds of an iteration with and one without hypergradient: the first finds the radius and fills the
# allocator; a CUDA graph is replayed at the third call.
_WARM_UP = {"eager": 1, "compiled": 2, "graphs": 3}


@dataclass(frozen=True)
class Profile:
    """What the command shows. All times are per outer iteration, and with the profiler on but for one.

    Attributes:
        parts: add up to the whole; on a GPU with ``IDLE``.
        kinds: the same by kind of operation.
        operators: the most expensive ones.
        seconds: of an outer iteration without the profiler.
        profiled_seconds: of one with it.
        figures: of the iterations without it, by the names of ``Telemetry.read``.
        peak_flops: measured, of the device; None where unknown.
        first: number of the first iteration.
        iterations, due: how many were profiled, and how many of them took a hypergradient.
        device: its name.
        implementations: of operators and attention, precision and execution, in words.
        reading: of the trace.
        trace: the trace itself, JSON.
    """

    parts: list[PartTime]
    kinds: list[KindTime]
    operators: list[OperatorTime]
    seconds: float
    profiled_seconds: float
    figures: Mapping[str, float]
    peak_flops: float | None
    first: int
    iterations: int
    due: int
    device: str
    implementations: str
    reading: Reading
    trace: bytes


def profile_run(config: Config, run_dir: RunDir, iterations: int | None) -> Profile:
    """Profiles outer iterations after the last checkpoint of a run, or at the beginning of a new one.

    Trains in memory; nothing is written.

    Args:
        iterations: how many; None for a full cycle of ``hypergradient.every``. The first of them takes a
            hypergradient, if the policy learns.

    Raises:
        UserError: bad data, a damaged checkpoint, several processes, or a GPU that cannot be traced.
    """
    world = join_world(config.device)
    try:
        if world.size > 1:
            raise UserError(f"profile: found {world.size} processes, expected one; start it without torchrun")
        trainer = Trainer(config, run_dir, world, None)
        try:
            trainer.resume()
            count = iterations or (config.hypergradient.every if config.masking.learns else 1)
            return _Session(trainer, count).profile()
        finally:
            trainer.loaders.close()
    finally:
        leave_world()


class _Session:
    """A trainer, and the outer iterations that are measured."""

    def __init__(self, trainer: Trainer, count: int) -> None:
        self.trainer = trainer
        self.config, self.device = trainer.config, trainer.world.device
        self.count = count
        every = self.config.hypergradient.every
        # A finished run is profiled at its last iterations.
        self.first = min(trainer.iteration, self.config.iterations - 1) // every * every
        learns = trainer.levels.mask is not None
        self.due = sum(not (self.first + i) % every for i in range(count)) if learns else 0

    def profile(self) -> Profile:
        trainer, mask = self.trainer, self.trainer.levels.mask
        estimator = None if mask is None else mask.hypergradient.estimator
        classes = trainer.loaders.num_classes
        flops = part_flops(self.config, classes or 0, estimator, self.due / self.count)
        # What lives now lives to the end, as in a run: no collection has to look at it again.
        gc.collect()
        gc.freeze()
        try:
            self._warm_up()
            telemetry = trainer.start_telemetry()
            telemetry.flops_per_iteration = sum(flops.values())
            seconds = self._speed(telemetry)
            # Before the trace, which takes memory of its own.
            figures = telemetry.read()
            profiled_seconds, trace = self._traced()
        finally:
            gc.unfreeze()
        reading = read_trace(json.loads(trace))
        on_gpu = self.device.type == "cuda"
        if on_gpu and not reading.device:
            raise UserError(
                f"profile: torch's profiler recorded no kernel on {self.device}; see its messages"
            )
        return Profile(
            parts=part_times(reading, flops, on_gpu),
            kinds=kind_times(reading, on_gpu),
            operators=operator_times(reading, on_gpu)[:NUM_OPERATORS],
            seconds=seconds,
            profiled_seconds=profiled_seconds,
            figures=figures,
            peak_flops=telemetry.peaks.get("mfu"),
            first=self.first,
            iterations=self.count,
            due=self.due,
            device=torch.cuda.get_device_name(self.device) if on_gpu else "CPU",
            implementations=trainer.implementations,
            reading=reading,
            trace=trace,
        )

    def _warm_up(self) -> None:
        execution = resolve_execution(self.config.compute.execution, self.device)
        for _ in range(_WARM_UP[execution]):
            self.trainer.iterate(self.first)
            self.trainer.iterate(self.first + 1)

    def _speed(self, telemetry: Telemetry) -> float:
        """Seconds per outer iteration without the profiler; ``telemetry`` counts them."""
        self.trainer.telemetry = telemetry
        spent: list[float] = []
        while self.count * sum(spent) < MIN_SECONDS:
            spent.append(self._timed(self._iterate))
        self.trainer.telemetry = None
        seconds = sum(spent) / len(spent)
        for _ in range(self.count * len(spent)):
            telemetry.iterated(seconds)
        return seconds

    def _iterate(self) -> None:
        for number in range(self.first, self.first + self.count):
            with profiled(ITERATION):
                self.trainer.iterate(number)

    def _timed(self, run: Callable[[], None]) -> float:
        """Seconds per outer iteration; waits for the device at both ends."""
        self._synchronise()
        started = time.perf_counter()
        run()
        self._synchronise()
        return (time.perf_counter() - started) / self.count

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _traced(self) -> tuple[float, bytes]:
        """Seconds per outer iteration under the profiler, and its trace."""
        activities = [ProfilerActivity.CPU]
        if self.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
        else:
            # Above all levels: kineto complains of the absent GPU.
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")
        levels = self.trainer.levels
        _mark_backward(levels.pretrain.engine)
        if levels.mask is not None:
            # The next check of the radius, several times the price of a hypergradient, is as far as can be.
            levels.mask.hypergradient.taken = 1
        # In its own first iteration the profiler allocates.
        steps = schedule(wait=0, warmup=1, active=1)
        # Its one cycle is all that there is to keep; without saying so, torch 2.11 warns.
        with profile(activities=activities, schedule=steps, acc_events=True) as profiler:
            self.trainer.iterate(self.first)
            self._synchronise()
            profiler.step()
            seconds = self._timed(self._iterate)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            return seconds, path.read_bytes()


def _mark_backward(engine: Engine) -> None:
    """Gives the engine's backward passes a range of their own; a step is a backward pass and an update."""
    accumulate = engine.accumulate

    def marked(loss: Tensor) -> None:
        with profiled("pretrain/backward"):
            accumulate(loss)

    engine.accumulate = marked  # type: ignore[method-assign]
