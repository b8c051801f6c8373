"""How long the trainer waits for its data: plain MAE steps on CIFAR-10 shards."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.comparison import OURS, Compare
from benchmarks.data.models import MODELS
from benchmarks.environment import ROOT
from benchmarks.report import Bar, Report
from benchmarks.timing import Stopwatch
from mlomae.config import load_config
from mlomae.distributed.env import join_world
from mlomae.run_dir import RunDir
from mlomae.trainer import Trainer

ROUNDS, WARM_UP = 50, 5
MAX_SHARE = 0.02


@pytest.mark.parametrize("model", MODELS)
def test_data_wait(
    model: str,
    shards: Path,
    compare: Compare,
    report: Report,
    smoke: list[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    overrides = {"data.path": str(shards.resolve()), "masking.policy": "random", **MODELS[model]}
    config = load_config(ROOT / "recipes" / "cifar10_micro.yaml", overrides)
    trainer = Trainer(config, RunDir(tmp_path, config), join_world("cpu"), None)
    stopwatch = Stopwatch(monkeypatch)
    stopwatch.watch("data", trainer.levels.pretrain, "next_batch")
    stopwatch.watch("rest", trainer, "iterate")
    rows: list[dict[str, float]] = []

    def iterate() -> None:
        trainer.iterate(len(rows))
        rows.append(stopwatch.read())

    measured = rows[
        -len(compare(f"data/wait/{model}", iterate, {}, rounds=ROUNDS, warm_up=WARM_UP).seconds[OURS]) :
    ]
    waiting, working = (sum(row[part] for row in measured) for part in ("data", "rest"))
    share = waiting / (waiting + working)
    report.table(
        f"{model}: {len(measured)} iterations of {config.pretrain.unroll_steps} steps, "
        f"batches of {config.pretrain.batch_size}, on the CPU",
        [
            {
                "waiting, ms": 1e3 * waiting / len(measured),
                "working, ms": 1e3 * working / len(measured),
                "share waiting": share,
            }
        ],
    )
    if not smoke:
        report.check(Bar("share of the time that waits for data", share, "<", MAX_SHARE))
