"""Do learned masks stay alive? 2,000 outer iterations on CIFAR-10, a hypergradient in each of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.plots import plot_mask_health
from benchmarks.report import Bar, Report
from benchmarks.runs import train

pytestmark = pytest.mark.study

RECIPE = "recipes/cifar10_micro.yaml"
ITERATIONS, LOG_EVERY = 2000, 40
# Agreement of two images of a batch at a mask ratio of 0.75: by chance, and when all masks are the same.
CHANCE, ALIKE = 0.625, 1.0
MIN_ENTROPY, MAX_SATURATION = 0.5, 0.1
# Half-way from chance to one mask for all images.
MAX_AGREEMENT = (CHANCE + ALIKE) / 2
SHOWN = (
    "loss/pretrain",
    "loss/mask",
    "mask/entropy",
    "mask/saturation",
    "mask/spread",
    "mask/agreement_noiseless",
    "hypergradient/norm",
)


def test_mask_health(
    request: pytest.FixtureRequest, cifar10: Path, report: Report, smoke: list[str], work_dir: Path
) -> None:
    run_dir = work_dir / "mask-health"
    length = ["--iterations", str(ITERATIONS), "--log-every", str(LOG_EVERY), "--picture-every", "500"]
    data = ["--data.path", str(cifar10)]
    result = train(run_dir, *length, *data, *smoke, recipe=RECIPE).result
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]

    shown = rows[:: max(1, len(rows) // 10)]
    shown = shown if shown[-1] is rows[-1] else [*shown, rows[-1]]
    report.table(
        f"{RECIPE}, {result['iterations']} outer iterations, seed {result['seed']}",
        [{"iteration": row["step"], **{name: row.get(name) for name in SHOWN}} for row in shown],
    )
    report.table("at its end", [{name: result[name] for name in ("knn_accuracy", "linear_accuracy")}])
    if smoke:
        return
    report.check(*_bars(rows))
    if request.config.getoption("record"):
        plot_mask_health(rows, CHANCE)


def _bars(rows: list[dict[str, Any]]) -> list[Bar]:
    """Over all log lines."""
    return [
        Bar("lowest mask/entropy, bits", min(row["mask/entropy"] for row in rows), ">=", MIN_ENTROPY),
        Bar("highest mask/saturation", max(row["mask/saturation"] for row in rows), "<=", MAX_SATURATION),
        Bar(
            "highest mask/agreement_noiseless",
            max(row["mask/agreement_noiseless"] for row in rows),
            "<=",
            MAX_AGREEMENT,
        ),
    ]
