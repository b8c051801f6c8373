"""Paired differences and their intervals, and the tables and pictures that tell of them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from scipy import stats

from mlomae.study.comparison import compare, difference
from mlomae.study.plots import draw
from mlomae.study.report import render, table
from mlomae.study.results import load_results
from tests.study.made import results

SCORES = {"random": [0.40, 0.43, 0.41], "learned": [0.42, 0.44, 0.44], "block": [0.41, 0.42]}


def test_interval_is_that_of_the_paired_t_test() -> None:
    _, learned, _ = compare(results(SCORES), "steps")
    found = learned.differences["knn_accuracy"]

    expected = stats.ttest_rel(SCORES["learned"], SCORES["random"]).confidence_interval(0.95)
    assert found.mean - found.half == pytest.approx(expected.low)
    assert found.mean + found.half == pytest.approx(expected.high)
    assert found.pairs == 3


def test_pairs_are_of_the_same_seed() -> None:
    made = results({"random": [0.1, 0.5], "learned": [0.2, 0.6]})
    # Same seeds, other order.
    shuffled = type(made)(made.study, made.planned, made.rows[::-1], made.machine)
    _, learned = compare(shuffled, "flops")
    assert learned.differences["knn_accuracy"].mean == pytest.approx(0.1)
    assert learned.differences["knn_accuracy"].half == pytest.approx(0, abs=1e-12)


def test_seeds_without_a_partner_count_in_the_mean_only() -> None:
    made = results({"random": [0.4], "learned": [0.5, 0.9]})
    _, learned = compare(made, "steps")
    assert learned.mean("knn_accuracy") == pytest.approx(0.7)
    found = learned.differences["knn_accuracy"]
    assert (found.mean, found.half, found.pairs) == (pytest.approx(0.1), None, 1)
    assert not found.excludes_zero


def test_only_runs_of_the_budget_are_compared() -> None:
    made = results(SCORES)
    rows = tuple(row for row in made.rows if row.arm != "block")
    assert [arm.arm for arm in compare(type(made)(made.study, 9, rows, {}), "flops")] == ["random", "learned"]


def test_difference_that_is_beyond_noise() -> None:
    assert difference([0.02, 0.021, 0.019]).excludes_zero
    assert not difference([0.02, -0.021, 0.019]).excludes_zero
    assert difference([-0.02, -0.021, -0.019]).excludes_zero


def test_table_has_a_row_for_each_arm_in_points() -> None:
    made = results({"random": [0.40, 0.42], "learned": [0.42, 0.44], "alone": [0.5]})
    head, rule, random, learned, alone = table(made, "flops").splitlines()

    assert head == "| arm | runs | steps | TFLOP | seconds | k-NN accuracy | Δ |"
    assert rule == "| --- | --- | --- | --- | --- | --- | --- |"
    assert random == "| random | 2 | 8 | 2 | 10 | 41.00 ± 1.41 |  |"
    assert learned == "| learned | 2 | 8 | 2 | 10 | 43.00 ± 1.41 | **+2.00 ± 0.00** |"
    assert alone == "| alone | 1 | 8 | 2 | 10 | 50.00 | +10.00 |"


def test_an_evaluation_may_be_that_of_some_arms() -> None:
    made = results({"random": [0.40, 0.42], "learned": [0.42, 0.44], "block": [0.5, 0.5]})
    tuned = {"random": [0.6, 0.7], "learned": [0.62, 0.72]}
    rows = tuple(
        replace(row, figures=row.figures | {"finetune_accuracy": tuned[row.arm][row.seed]})
        if row.arm in tuned
        else row
        for row in made.rows
    )
    head, _, random, learned, block = table(replace(made, rows=rows), "flops").splitlines()
    assert head.endswith("| k-NN accuracy | Δ | Fine-tuned | Δ |")
    assert random.endswith("| 65.00 ± 7.07 |  |")
    assert learned.endswith("| 67.00 ± 7.07 | **+2.00 ± 0.00** |")
    assert block.endswith("| +9.00 ± 12.71 |  |  |")


def test_page_tells_of_every_budget_and_how_much_is_done() -> None:
    page = render(results(SCORES), ["a.svg"])
    assert "8 of 8 runs; device a processor, torch 9.9." in page
    assert "## At equal steps" in page and "## At equal FLOPs" in page
    assert "![](a.svg)" in page


def test_same_results_give_the_same_pictures(tmp_path: Path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    for folder in (first, second):
        folder.mkdir()
        assert draw(results(SCORES), (), folder) == ["differences.svg", "masks.svg"]
    for name in ("differences.svg", "masks.svg"):
        text = (first / name).read_text()
        assert text == (second / name).read_text()
        assert text.count("<path") > 10


def test_runs_of_an_arm_may_be_logged_at_other_intervals(tmp_path: Path) -> None:
    made = results(SCORES)
    first, *others = made.rows
    rows = (replace(first, curves={"mask/agreement": ([1, 2, 4], [0.5, 0.6, 0.7])}), *others)
    assert draw(replace(made, rows=rows), (), tmp_path) == ["differences.svg", "masks.svg"]


def test_results_survive_their_file(tmp_path: Path) -> None:
    made = results(SCORES)
    path = tmp_path / "results.json"
    path.write_text(made.dump())
    read = load_results(path)
    assert [arm.differences for arm in compare(read, "steps")] == [
        arm.differences for arm in compare(made, "steps")
    ]
    assert read.dump() == made.dump()
    # A run per line: a diff of two results files can be read.
    assert sum(line.startswith('{"digest"') for line in made.dump().splitlines()) == len(made.rows)
