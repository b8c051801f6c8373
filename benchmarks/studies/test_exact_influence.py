"""What could a masking network reach at best? Every patch weighed by its exact influence, step by step.

A masking network predicts from an image which patches help the held-out loss. Here nothing is predicted:
before each pretrain step the influence of all its patches is computed, and becomes their scores. That costs
several times a plain step and is no method; it shows what the signal is worth, without the network's error.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.environment import ROOT
from benchmarks.report import Report, Row, Spread
from mlomae.config import Config, load_config
from mlomae.distributed.env import join_world
from mlomae.hypergradient import MaskedBatch
from mlomae.levels import mean_of
from mlomae.run_dir import RunDir, Status
from mlomae.study.comparison import difference
from mlomae.trainer import Trainer

pytestmark = pytest.mark.study

RECIPE = ROOT / "recipes" / "cifar10_pico.yaml"
STRENGTH = 2.0
"""Score of a patch whose influence is one standard deviation of its batch: a weight of 0.88."""
SETTINGS = {
    "random masks": {"masking.policy": "random"},
    "random masks, weighed by exact influence": {"masking.policy": "weighted-random", "mask.lr": "0"},
}
FIGURES = ("knn_accuracy", "linear_accuracy")


class ExactInfluence(Trainer):
    """Pretrain steps whose weights are the influences of the patches that they remove."""

    def iterate(self, iteration: int) -> MaskedBatch:
        levels = self.levels
        if levels.mask is None or levels.head is None:
            return super().iterate(iteration)
        hypergradient, steps = levels.mask.hypergradient, []
        for _ in range(self.config.pretrain.unroll_steps):
            masked = levels.pretrain.mask(levels.pretrain.next_batch())
            train, heldout = levels.head.next_batch(), levels.mask.next_batch()
            assert train.labels is not None
            direction = hypergradient.direction(train, heldout, iteration)
            influence, _ = hypergradient.influence(masked, direction)
            spread = influence[masked.selection.mask.bool()].std()
            masked = replace(masked, scores=STRENGTH * influence / spread)
            masked, metrics = levels.pretrain.step_masked(masked, iteration)
            steps.append(metrics)
        scalars = mean_of(steps) | {"loss/mask": direction.heldout_loss}
        scalars |= levels.head.step(direction.train_features, train.labels, iteration)
        self.meters.add(scalars)
        self.score_meter.add({self.scored: scalars[self.scored]})
        return masked


def _train(config: Config) -> dict[str, Any]:
    """A run to its end; a finished one is only read."""
    run_dir = RunDir(config.run_dir, config)
    if run_dir.claim(primary=False) is Status.COMPLETE:
        return run_dir.read_result()
    trainer = ExactInfluence(config, run_dir, join_world(config.device), None)
    run_dir.claim(primary=True)
    try:
        return trainer.fit()
    finally:
        run_dir.release()


def test_exact_influence(
    request: pytest.FixtureRequest, cifar10: Path, report: Report, smoke: list[str], work_dir: Path
) -> None:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    data = {"data.path": str(cifar10), "loggers": "[]", "display": "quiet"}
    data |= {name.removeprefix("--"): value for name, value in zip(smoke[::2], smoke[1::2], strict=True)}
    rows: list[dict[str, Any]] = []
    for seed in request.config.getoption("seeds"):
        for name, settings in SETTINGS.items():
            run_dir = str(work_dir / f"{settings['masking.policy']}-seed{seed}")
            config = load_config(RECIPE, {**data, **settings, "seed": seed, "run_dir": run_dir})
            result = _train(config)
            report.say(f"{name}, seed {seed}: {result['seconds']:.0f} s of training")
            rows.append({"weights": name, "seed": seed, **{figure: result[figure] for figure in FIGURES}})
    report.table("runs", rows)
    iterations = config.iterations
    report.table(
        f"{iterations} iterations, mean ± standard deviation", [_mean(rows, name) for name in SETTINGS]
    )
    plain, exact = ([row for row in rows if row["weights"] == name] for name in SETTINGS)
    found = {
        figure: difference([b[figure] - a[figure] for a, b in zip(plain, exact, strict=True)])
        for figure in FIGURES
    }
    report.table(
        "exact minus random, same seeds, with half of the 95 % confidence interval",
        [{"figure": figure, "mean": found[figure].mean, "half": found[figure].half} for figure in FIGURES],
    )


def _mean(rows: list[dict[str, Any]], name: str) -> Row:
    own = [row for row in rows if row["weights"] == name]
    return {"weights": name, **{figure: Spread.of([row[figure] for row in own]) for figure in FIGURES}}
