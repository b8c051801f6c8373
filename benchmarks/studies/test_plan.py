"""How far is ``mlomae plan`` from the memory of real outer iterations? Small models on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.report import Bar, Report
from tests.planning.measured import CASES, measure

pytestmark = pytest.mark.study

MAX_ERROR = 0.1
MIB = 2**20


def test_plan(report: Report, tmp_path: Path, smoke: list[str]) -> None:
    rows = []
    for number, (name, fields) in enumerate(CASES.items()):
        found, memory = measure(tmp_path / str(number), fields)
        worst = memory.worst()
        rows.append(
            {
                "case": name,
                "measured, MiB": found / MIB,
                "predicted, MiB": worst.beyond / MIB,
                "error": worst.beyond / found - 1,
                "worst moment": worst.name,
            }
        )
    report.table("peak of two outer iterations beyond what lives between them", rows)
    if not smoke:
        errors = {str(row["case"]): abs(float(str(row["error"]))) for row in rows}
        bars = (Bar(f"{name}: relative error", error, "<=", MAX_ERROR) for name, error in errors.items())
        report.check(*bars)
