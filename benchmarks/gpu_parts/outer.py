"""An outer iteration, through the real trainer: its price over as many plain pretraining steps.

Batches come from the trainer's own streams and are used again and again: loading is not what is measured.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_parts import profiling
from benchmarks.gpu_parts.clock import Clock, forget_peak, peak_gib
from benchmarks.gpu_parts.job import Job
from benchmarks.gpu_parts.models import MODELS, SMOKE_MODEL, Model

BATCH, EVERY = 128, 4
OVER_PLAIN = 2.2
CYCLES, WARM_UP = 5, 1
_ESTIMATORS = {"jvp": "engine", "fd": "float32"}


class Replay:
    """A stream that gives its first batches again and again, under new numbers."""

    def __init__(self, stream: Any, count: int) -> None:
        self.stream = stream
        self._batches = [stream.next() for _ in range(count)]
        self._number = 0

    def next(self) -> Any:
        batch = self._batches[self._number % len(self._batches)]
        self._number += 1
        return replace(batch, number=self._number)


def run(job: Job) -> Iterator[None]:
    """Compiles a trainer with and one without masking network; then both take turns."""
    model = SMOKE_MODEL if job.smoke else MODELS["b16"]
    batch = 4 if job.smoke else BATCH
    with tempfile.TemporaryDirectory() as scratch:
        from benchmarks.peers.problem import write_images

        images = Path(scratch) / "images"
        write_images(images)
        learned = build_trainer(job, model, batch, images, Path(scratch) / "learned", {})
        plain = build_trainer(
            job, model, batch, images, Path(scratch) / "plain", {"masking.policy": "random"}
        )
        job.note(f"learned masks: {learned.implementations}")
        for number in range(WARM_UP * EVERY):
            learned.iterate(number)
            plain.iterate(number)
        prepared = False
        with job.attempt("prepare the estimators", needed=False):
            # A finite difference in float32 is compiled on its own.
            if job.smoke or job.left() > 70:
                _estimators(job, learned, timed=False)
                prepared = True
        yield
        _price(job, model, batch, learned, plain)
        if prepared:
            with job.attempt("estimators"):
                job.require(1 if job.smoke else 10, "estimators")
                _estimators(job, learned, timed=True)
        else:
            job.note("estimators: left out, there was no time to compile them")
        with job.attempt("where the host waits"):
            job.require(1 if job.smoke else 5, "where the host waits")
            _waits(job, learned)
        titles = ("an outer iteration with hypergradient", "one without hypergradient")
        for number, (key, title) in enumerate(zip(("outer", "between"), titles, strict=True)):
            with job.attempt(f"profile of {title}"):
                job.require(1 if job.smoke else 12, f"profile of {title}")

                def iterate(number: int = number) -> None:
                    learned.iterate(number)

                profiling.report(job, key, title, iterate, keep_trace=number == 0)


def build_trainer(
    job: Job, model: Model, batch: int, images: Path, run_dir: Path, overrides: dict[str, str]
) -> Any:
    """A ``Trainer`` on small pictures, scaled up to the model's size, with constant rates."""
    from mlomae.config import load_config
    from mlomae.distributed.env import join_world
    from mlomae.run_dir import RunDir
    from mlomae.trainer import Trainer

    fields = {f"model.{name}": str(value) for name, value in model.fields().items()}
    sizes = {f"{level}.batch_size": str(batch) for level in ("pretrain", "head", "mask")}
    warmups = {f"{level}.warmup": "0" for level in ("pretrain", "head", "mask")}
    tree = {
        "iterations": "1000000", "device": job.device.type,
        "data.dataset": "folder", "data.path": str(images), "data.heldout_fraction": "0.3",
        "pretrain.lr": "1.5e-4", "hypergradient.every": str(EVERY),
        "compute.precision": "bf16", "compute.execution": "eager" if job.smoke else "compiled",
        **fields, **sizes, **warmups, **overrides,
    }  # fmt: skip
    config = load_config(None, tree)
    trainer = Trainer(config, RunDir(run_dir, config), join_world(job.device.type), None)
    for level in trainer.levels.by_name().values():
        level.stream = Replay(level.stream, 2 if job.smoke else 4)
    return trainer


def _price(job: Job, model: Model, batch: int, learned: Any, plain: Any) -> None:
    """Milliseconds of an iteration with and without hypergradient and of its plain steps, in turns."""
    cycles = 1 if job.smoke else CYCLES
    rounds: dict[str, list[list[float]]] = {"plain": [], "learned": []}
    peaks: dict[str, float | None] = {}
    for cycle in range(cycles):
        if cycle > 1 and job.left() < 40:
            job.note(f"{cycle} of {cycles} cycles for lack of time")
            break
        for name, trainer in (("plain", plain), ("learned", learned)):
            forget_peak(job.device)
            rounds[name].append(_cycle(job, trainer))
            peaks[name] = peak_gib(job.device)
    plain_ms, default = (
        statistics.median(statistics.fmean(cycle) for cycle in rounds[name]) for name in ("plain", "learned")
    )
    due = statistics.median(first for first, *_ in rounds["learned"])
    between = statistics.median(one for _, *others in rounds["learned"] for one in others)
    steps = learned.config.pretrain.unroll_steps
    times = {
        f"{steps} plain pretraining steps": (plain_ms, peaks["plain"]),
        "outer iteration with hypergradient (every: 1)": (due, peaks["learned"]),
        "outer iteration without": (between, peaks["learned"]),
        f"outer iteration, default (every: {EVERY})": (default, peaks["learned"]),
    }
    rows = [
        {
            "what": what,
            "ms": milliseconds,
            "over the plain steps": milliseconds / plain_ms,
            "images/s": steps * batch / milliseconds * 1e3,
            "peak of the run, GiB": peak,
        }
        for what, (milliseconds, peak) in times.items()
    ]
    job.table("price", f"{model.title}, batch {batch} at every level, bf16 autocast", rows)
    what = f"{model.title}: outer iteration over its plain steps, every {EVERY}"
    job.bar(what, default / plain_ms, "<=", OVER_PLAIN)


def _cycle(job: Job, trainer: Any) -> list[float]:
    """Milliseconds of each of ``EVERY`` iterations, the first with a hypergradient, without a pause."""
    clock = Clock(job.device)
    clock.wait()
    marks = [clock.mark()]
    for number in range(EVERY):
        trainer.iterate(number)
        marks.append(clock.mark())
    clock.wait()
    return [clock.between(first, last) for first, last in itertools.pairwise(marks)]


def _timed(job: Job, run: Callable[[], object]) -> float:
    """Milliseconds by the host's clock, to the end of the device's work: what a user waits for."""
    clock = Clock(job.device)
    clock.wait()
    started = time.perf_counter()
    run()
    clock.wait()
    return 1e3 * (time.perf_counter() - started)


def _estimators(job: Job, trainer: Any, timed: bool) -> None:
    """Time of each estimator of the influence, and of the direction; the cosine between them."""
    from mlomae.hypergradient import Hypergradient

    levels, config = trainer.levels, trainer.config
    masked, _ = levels.pretrain.step(levels.pretrain.next_batch(), 0, record=True)
    train, heldout = levels.head.next_batch(), levels.mask.next_batch()
    rounds = 1 if job.smoke or not timed else 4
    rows: list[dict[str, str | float | None]] = []
    values: dict[str, Tensor] = {}

    def measure(what: str, run: Callable[[], Any]) -> Any:
        result = run()
        forget_peak(job.device)
        spent = statistics.median(_timed(job, run) for _ in range(rounds))
        rows.append({"piece": what, "ms": spent, "peak, GiB": peak_gib(job.device), "cosine to jvp": None})
        return result

    usual = levels.mask.hypergradient
    direction = measure("direction v", lambda: usual.direction(train, heldout, 0))
    for name, precision in _ESTIMATORS.items():
        section = config.hypergradient.model_copy(
            update={"estimator": name, "precision": precision, "check_every": 0}
        )
        hypergradient = Hypergradient(
            config.model_copy(update={"hypergradient": section}), levels.pretrain.engine, levels.head.problem
        )
        what = f"influence, {name} in {'bf16 autocast' if precision == 'engine' else precision}"
        values[name], _ = measure(what, lambda h=hypergradient: h.influence(masked, direction))
        rows[-1]["cosine to jvp"] = _cosine(values[name], values["jvp"], masked.selection.mask)
    if timed:
        job.table("estimators", "the hypergradient's pieces on one batch", rows)


def _cosine(first: Tensor, second: Tensor, mask: Tensor) -> float:
    """Of two influences [B, L] as the masking network feels them: its scores are centred per image."""
    centred = []
    for influence in (first, second):
        kept = influence.double() * mask
        mean = kept.sum(1, keepdim=True) / mask.sum(1, keepdim=True)
        centred.append(((kept - mean) * mask).flatten())
    return float(torch.nn.functional.cosine_similarity(*centred, dim=0))


def _waits(job: Job, trainer: Any) -> None:
    """Whether the host runs ahead of the GPU, piece by piece; the pieces were compiled before."""
    levels = trainer.levels
    pieces: dict[str, Callable[[], object]] = {
        "next batch": levels.pretrain.stream.stream.next,
        "pretraining step": lambda: levels.pretrain.step(levels.pretrain.next_batch(), 1),
        "outer iteration with hypergradient": lambda: trainer.iterate(0),
        "outer iteration without": lambda: trainer.iterate(1),
    }
    rows = []
    for what, piece in pieces.items():
        with job.attempt(f"waits: {what}"):
            rows.append(profiling.waiting_row(what, piece))
    job.table("waits", "does the host ever wait for the GPU?", rows)
