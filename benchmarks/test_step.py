"""Where the time of one outer iteration goes, and what it costs beyond plain pretraining."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.environment import ROOT
from benchmarks.report import Report, Spread
from benchmarks.runs import RECIPE
from mlomae.config import Config, load_config
from mlomae.distributed.env import join_world
from mlomae.run_dir import RunDir
from mlomae.trainer import Trainer

WARM_UP = 3
ROUNDS = 15
# What changes from the digits recipe. CIFAR's size and patches on digits scaled up: no download.
CASES: dict[str, dict[str, str]] = {
    "digits": {},
    "cifar-size": {
        "model.arch": "vit_tiny", "model.img_size": "32", "model.patch_size": "4", "model.decoder_dim": "96",
        "model.decoder_depth": "2", "masking.ratio": "0.75", "pretrain.batch_size": "32",
        "head.batch_size": "32", "mask.batch_size": "32",
    },
}  # fmt: skip


class Stopwatch:
    """Seconds spent in watched methods by part; what a watched method calls counts for that part only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._inside = 0.0
        self._monkeypatch = monkeypatch

    def watch(self, part: str, owner: object, method: str) -> None:
        original = getattr(owner, method)

        def timed(*args: Any) -> Any:
            outside, self._inside = self._inside, 0.0
            started = time.perf_counter()
            result = original(*args)
            elapsed = time.perf_counter() - started
            self._seconds[part] += elapsed - self._inside
            self._inside = outside + elapsed
            return result

        self._monkeypatch.setattr(owner, method, timed)

    def read(self) -> dict[str, float]:
        """Seconds by part since the last read."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds


def _watch(trainer: Trainer, stopwatch: Stopwatch) -> None:
    """Splits ``trainer.iterate`` into its parts, which add up to the whole."""
    levels = trainer.levels
    for level in levels.by_name().values():
        stopwatch.watch("data", level, "next_batch")
    stopwatch.watch(f"{trainer.config.pretrain.unroll_steps} pretrain steps", levels.pretrain, "step")
    if levels.mask is not None and levels.head is not None:
        stopwatch.watch("direction", levels.mask.hypergradient, "direction")
        stopwatch.watch("head step", levels.head, "step")
        stopwatch.watch("influence", levels.mask.hypergradient, "influence")
        stopwatch.watch("mask step", levels.mask, "step")
    stopwatch.watch("rest", trainer, "iterate")


def _describe(config: Config) -> str:
    model = config.model
    height, width = model.size
    return (
        f"{model.arch}, {height}x{width}, patch {model.patch_size}, batch {config.pretrain.batch_size}, "
        f"on the CPU, medians of {ROUNDS}"
    )


@pytest.mark.parametrize("case", CASES)
def test_step(case: str, report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    world = join_world("cpu")
    trainers: dict[str, Trainer] = {}
    stopwatches: dict[str, Stopwatch] = {}
    for policy in ("learned", "random"):
        config = load_config(ROOT / RECIPE, {**CASES[case], "masking.policy": policy})
        trainers[policy] = Trainer(config, RunDir(tmp_path / policy, config), world, None)
        stopwatches[policy] = Stopwatch(monkeypatch)
        _watch(trainers[policy], stopwatches[policy])

    times: dict[str, list[dict[str, float]]] = {"learned": [], "random": []}
    for number in range(WARM_UP + ROUNDS):
        # Alternating, so that a change in the machine's load meets both.
        for policy, trainer in trainers.items():
            trainer.iterate(number)
            seconds = stopwatches[policy].read()
            if number >= WARM_UP:
                times[policy].append(seconds)

    totals = {policy: [sum(row.values()) for row in rows] for policy, rows in times.items()}
    whole = statistics.median(totals["learned"])
    parts = {part: statistics.median(row[part] for row in times["learned"]) for part in times["learned"][0]}
    report.table(
        _describe(trainers["learned"].config),
        [
            {"part": part, "ms": 1e3 * seconds, "share": f"{seconds / whole:.0%}"}
            for part, seconds in {**parts, "outer iteration": whole}.items()
        ],
    )
    ratios = [a / b for a, b in zip(totals["learned"], totals["random"], strict=True)]
    report.table(
        "outer iteration against as many plain pretrain steps",
        [
            {
                "learned, ms": 1e3 * whole,
                "random, ms": 1e3 * statistics.median(totals["random"]),
                "median ratio": statistics.median(ratios),
                "ratio": Spread.of(ratios),
            }
        ],
    )
