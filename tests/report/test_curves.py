"""Which plots there are, and what they are given to draw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlomae.report.curves import Group, Panel, curves, removal_chance
from mlomae.report.reading import Run, read_runs
from mlomae.report.series import MAX_POINTS
from tests.report.made import Made, make_run


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    root = tmp_path_factory.mktemp("runs")
    made = Made(logged=700, every=2, pictured=0)
    learned = make_run(root / "learned", made)
    random = make_run(root / "random", Made(policy="random", logged=20, pictured=0))
    return read_runs([learned, random])


def panel(groups: list[Group], title: str) -> Panel:
    return next(panel for group in groups for panel in group.panels if panel.plot.title == title)


def test_all_runs_are_in_one_plot_with_few_points(pair: list[Run]) -> None:
    lines = panel(curves(pair), "Pretraining loss").data["lines"]
    assert [line["run"] for line in lines] == [0, 1]
    assert [len(line["x"]) <= MAX_POINTS for line in lines] == [True, True]
    assert len(lines[0]["x"]) > MAX_POINTS / 2 and len(lines[1]["x"]) == 20
    assert lines[0]["x"][-1] == 1400
    assert lines[0]["y"][-1] == pytest.approx(pair[0].scalars["loss/pretrain"].values[-1], rel=1e-4)


def test_chance_is_that_of_two_random_masks(pair: list[Run]) -> None:
    agreement = panel(curves(pair), "Agreement").data
    assert agreement["levels"][0]["y"] == removal_chance(0.75) == 0.625
    assert len(agreement["levels"]) == 1
    styles = [(line["run"], line["style"]) for line in agreement["lines"]]
    assert styles == [(0, ""), (0, "dashed"), (1, "")]


def test_logarithmic_axes_where_values_span_decades(pair: list[Run]) -> None:
    groups = curves(pair)
    assert panel(groups, "Hypergradient norm").data["log"] is True
    # Learning rates do too, and shares: their shape is known without.
    for title in ("Pretraining loss", "Learning rate, pretraining", "Saturation"):
        assert panel(groups, title).data["log"] is False


def test_runs_without_a_level_are_named(pair: list[Run]) -> None:
    without = {group.title: group.without for group in curves(pair)}
    assert without["Hypergradient"] == ["random"] and without["Pretraining"] == []


def test_a_plot_without_values_is_left_out_and_unknown_scalars_are_drawn(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", Made(logged=1, pictured=0))
    rows = [{"step": step, "novel": step, "loss/mask": None, "bad_samples": 0} for step in (1, 2)]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    groups = curves(read_runs([path]))
    assert [(group.title, [panel.plot.title for panel in group.panels]) for group in groups] == [
        ("Other", ["novel"])
    ]


def test_bad_samples_are_drawn_where_there_are_any(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", Made(logged=1, pictured=0))
    (path / "metrics.jsonl").write_text('{"step": 1, "bad_samples": 0}\n{"step": 2, "bad_samples": 3}\n')
    assert panel(curves(read_runs([path])), "bad_samples").data["lines"][0]["y"] == [0, 3]


def test_gaps_reach_the_page_and_the_words(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", Made(logged=1, pictured=0))
    rows = [{"step": step, "loss/pretrain": value} for step, value in ((1, 2.0), (2, None), (3, 1.0))]
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = panel(curves(read_runs([path])), "Pretraining loss")
    assert found.data["lines"][0]["y"] == [2, None, 1]
    assert "a: from 2.000 to 1.000, between 1.000 and 2.000, 1 values not finite" in found.summary
