"""The quickstart: how long it takes and how good its encoder is."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.report import Bar, Report
from benchmarks.runs import train

pytestmark = pytest.mark.study

MAX_SECONDS = 300
MIN_ACCURACY = {"knn_accuracy": 0.95, "linear_accuracy": 0.96}


def test_quickstart(report: Report, smoke: list[str], tmp_path: Path) -> None:
    run = train(tmp_path / "run", *smoke)
    result = run.result
    report.table(
        f"{result['policy']} mask, {result['iterations']} iterations",
        [
            {"features": name, **{accuracy: result[prefix + accuracy] for accuracy in MIN_ACCURACY}}
            for name, prefix in (("encoder", ""), ("raw pixels", "pixel_"))
        ],
    )
    bars = [Bar("the whole command, s", run.wall_seconds, "<", MAX_SECONDS)]
    if not smoke:
        bars += [Bar(name, result[name], ">=", bound) for name, bound in MIN_ACCURACY.items()]
    report.check(*bars)
