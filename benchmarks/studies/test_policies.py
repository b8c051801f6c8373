"""Mask policies compared: same recipe, iterations and test set, several seeds. Nobody has to win."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report import Report, Row, Spread
from benchmarks.runs import train

pytestmark = pytest.mark.study

ACCURACIES = ("knn_accuracy", "linear_accuracy")
FIGURES = (*ACCURACIES, "seconds", "images_per_second")


def _summary(results: list[dict[str, Any]]) -> list[Row]:
    """A row per policy in order of appearance, and the baseline without an encoder."""
    policies = dict.fromkeys(result["policy"] for result in results)
    rows: list[Row] = [
        {
            "mask": policy,
            **{name: Spread.of([r[name] for r in results if r["policy"] == policy]) for name in FIGURES},
        }
        for policy in policies
    ]
    # The same for every run: a seed changes weights, batches and noise, not the split.
    pixels = {name: results[0].get(f"pixel_{name}") for name in FIGURES}
    return [*rows, {"mask": "(raw pixels)", **pixels}]


def test_policies(request: pytest.FixtureRequest, report: Report, smoke: list[str], work_dir: Path) -> None:
    policies, seeds = request.config.getoption("policies"), request.config.getoption("seeds")
    results: list[dict[str, Any]] = []
    # Policies alternate, so that a change in the machine's load does not favour one of them.
    for seed in seeds:
        for policy in policies:
            run_dir = work_dir / f"{policy}-seed{seed}"
            overrides = ("--masking.policy", policy, "--seed", seed, *smoke)
            result = train(run_dir, *overrides).result
            assert all(result[name] is not None and math.isfinite(result[name]) for name in FIGURES), result
            report.say(f"{policy}, seed {seed}: {result['seconds']:.0f} s of training")
            results.append(result)
    report.table(
        "runs", [{name: result[name] for name in ("policy", "seed", *FIGURES)} for result in results]
    )
    report.table(
        f"{results[0]['iterations']} iterations, mean ± standard deviation over seeds "
        f"{', '.join(seeds)}; seconds of training, on the CPU",
        _summary(results),
    )
