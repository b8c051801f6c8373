"""Where the time of one outer iteration goes, and what it costs beyond plain pretraining."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.comparison import OURS, Compare
from benchmarks.environment import ROOT
from benchmarks.report import Report, Row
from benchmarks.runs import RECIPE
from benchmarks.timing import Stopwatch
from mlomae.config import Config, load_config
from mlomae.distributed.env import join_world
from mlomae.run_dir import RunDir
from mlomae.trainer import Trainer

# What changes from the digits recipe. CIFAR's size and patches on digits scaled up: no download.
CASES: dict[str, dict[str, str]] = {
    "digits": {},
    "cifar-size": {
        "model.arch": "vit_tiny", "model.img_size": "32", "model.patch_size": "4", "model.decoder_dim": "96",
        "model.decoder_depth": "2", "masking.ratio": "0.75", "pretrain.batch_size": "32",
        "head.batch_size": "32", "mask.batch_size": "32",
    },
}  # fmt: skip
PLAIN = "plain pretrain steps"
# In this order in the table. The first ones make up the pretrain steps.
PRETRAIN = "pretrain steps: rest"
PARTS = (
    "data",
    "pretrain steps: masks",
    "pretrain steps: forward",
    "pretrain steps: backward, clipping",
    "pretrain steps: optimizer",
    PRETRAIN,
    "direction",
    "head step",
    "influence",
    "mask step",
    "rest",
)


def _watch(trainer: Trainer, stopwatch: Stopwatch) -> None:
    """Splits ``trainer.iterate`` into its parts, which add up to the whole."""
    levels = trainer.levels
    for level in levels.by_name().values():
        stopwatch.watch("data", level, "next_batch")
    pretrain, engine = levels.pretrain, levels.pretrain.engine
    stopwatch.watch(PRETRAIN, pretrain, "step")
    stopwatch.watch("pretrain steps: masks", pretrain, "mask")
    # The influence evaluates the same module.
    stopwatch.watch("pretrain steps: forward", engine.module, "forward", within=PRETRAIN)
    for method in ("accumulate", "descend", "descend_recorded"):
        stopwatch.watch("pretrain steps: backward, clipping", engine, method)
    stopwatch.watch("pretrain steps: optimizer", engine.optimizer, "step")
    if levels.mask is not None and levels.head is not None:
        stopwatch.watch("direction", levels.mask.hypergradient, "direction")
        stopwatch.watch("head step", levels.head, "step")
        stopwatch.watch("influence", levels.mask.hypergradient, "influence")
        stopwatch.watch("mask step", levels.mask, "step")
    stopwatch.watch("rest", trainer, "iterate")


def _iterations(trainer: Trainer) -> Callable[[], None]:
    number = 0

    def iterate() -> None:
        nonlocal number
        trainer.iterate(number)
        number += 1

    return iterate


def _describe(config: Config) -> str:
    model, (height, width) = config.model, config.model.size
    return (
        f"{model.arch}, {height}x{width}, patch {model.patch_size}, batch {config.pretrain.batch_size}, "
        f"{config.pretrain.unroll_steps} pretrain steps, on the CPU, medians"
    )


@pytest.mark.parametrize("case", CASES)
def test_step(
    case: str, report: Report, compare: Compare, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    world = join_world("cpu")
    trainers: dict[str, Trainer] = {}
    for policy in ("learned", "random"):
        config = load_config(ROOT / RECIPE, {**CASES[case], "masking.policy": policy})
        trainers[policy] = Trainer(config, RunDir(tmp_path / policy, config), world, None)
    stopwatch = Stopwatch(monkeypatch)
    _watch(trainers["learned"], stopwatch)
    parts: list[dict[str, float]] = []
    learned = _iterations(trainers["learned"])

    def iterate() -> None:
        learned()
        parts.append(stopwatch.read())

    compared = compare(f"step/outer-iteration-{case}", iterate, {PLAIN: _iterations(trainers["random"])})
    measured = parts[-len(compared.seconds[OURS]) :]
    whole = compared.medians[OURS]
    rows: list[Row] = []
    for part in PARTS:
        seconds = statistics.median(row.get(part, 0.0) for row in measured)
        rows.append({"part": part, "ms": 1e3 * seconds, "share": f"{seconds / whole:.0%}"})
    rows.append({"part": "outer iteration", "ms": 1e3 * whole, "share": "100%"})
    report.table(_describe(trainers["learned"].config), rows)
    report.table(
        "outer iteration against as many plain pretrain steps",
        [
            {
                "learned, ms": 1e3 * whole,
                "random, ms": 1e3 * compared.medians[PLAIN],
                "learned / random": 1 / compared.ratios[PLAIN],
            }
        ],
    )
