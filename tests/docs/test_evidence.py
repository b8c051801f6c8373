"""docs/evidence.md says what the recorded results of the studies say; they are those of the study files."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import evidence
from benchmarks.environment import ROOT
from mlomae.study.comparison import compare
from mlomae.study.plan import Budget, load_study
from mlomae.study.results import load_results

RECORDED = pytest.mark.parametrize("path", evidence.recorded(), ids=lambda path: path.stem)


def test_the_tables_are_those_of_the_results() -> None:
    page = evidence.PAGE.read_text()
    assert "<!-- table cifar10 flops -->" in page
    assert evidence.with_tables(page) == page, "`python -m benchmarks.evidence` writes them anew"


@pytest.mark.parametrize(
    ("start", "arm", "budget"),
    [
        ("| learned, equal FLOPs |", "learned", "flops"),
        ("| learned, equal steps (", "learned", "steps"),
        ("| a loss on the same labels instead", "label-loss", "flops"),
    ],
)
def test_the_questions_quote_the_results(start: str, arm: str, budget: Budget) -> None:
    lines = (ROOT / "docs" / "faq.md").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(start))
    (found,) = (
        row for row in compare(load_results(evidence.STUDIES / "cifar10.json"), budget) if row.arm == arm
    )
    shown = [
        f"{100 * it.mean:+.1f} ± {100 * it.half:.1f}".replace("-", "\N{MINUS SIGN}")
        for it in found.differences.values()
        if it.half
    ]
    assert [cell.strip() for cell in line.split("|")[2:-1]] == shown


@RECORDED
def test_results_are_those_of_the_whole_study(path: Path) -> None:
    results = load_results(path)
    assert results.study == load_study(ROOT / "benchmarks" / "studies" / f"{path.stem}.yaml")
    assert len(results.rows) == results.planned


@RECORDED
def test_plots_stand_beside_the_page(path: Path) -> None:
    page = evidence.PAGE.read_text()
    plots = sorted((evidence.PLOTS / path.stem).iterdir())
    assert {"differences.svg", "gallery.png", "masks.svg"} <= {plot.name for plot in plots}
    for plot in plots:
        assert str(plot.relative_to(evidence.PAGE.parent)) in page
