"""The tables: figures of finished runs, means over seeds, evaluations, configurations, machines."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import stdev

import pytest
import yaml

from mlomae.report.evaluations import evaluation_tables, result_table, seed_table
from mlomae.report.machine import machine_table, settings
from mlomae.report.reading import Run, read_runs
from mlomae.report.summary import card
from mlomae.report.tables import Table, Value
from tests.report.made import Made, make_run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Run]:
    """Learned with seeds 0 and 1, random with seeds 1 and 0, and one that is not finished."""
    root = tmp_path_factory.mktemp("runs")
    kinds = [("learned", 0, 0.02), ("learned", 1, 0.02), ("random", 1, 0.0), ("random", 0, 0.0)]
    paths = [
        make_run(root / f"{policy}-{seed}", Made(policy=policy, seed=seed, gain=gain, logged=4, pictured=0))
        for policy, seed, gain in kinds
    ]
    paths.append(make_run(root / "open", Made(logged=2, iterations=100, pictured=0, finished=False)))
    return read_runs(paths)


def column(table: Table, title: str) -> list[Value]:
    place = table.columns.index(title)
    return [row.cells[place] for row in table.rows]


def test_results_are_compared_with_random_masks_of_the_same_seed(runs: list[Run]) -> None:
    table = result_table(runs)
    assert table is not None
    assert [row.run for row in table.rows] == [0, 1, 2, 3]
    scores = column(table, "k-NN accuracy")
    assert [score.text.replace("\N{NO-BREAK SPACE}", " ") for score in scores] == [
        "46.50 %", "46.90 %", "44.90 %", "44.50 %"
    ]  # fmt: skip
    assert [score.best for score in scores] == [False, True, False, False]
    assert [score.change for score in scores] == ["+2.00", "+2.00", "", ""]
    assert "random mask" in table.note


def test_other_loader_processes_are_no_other_data(tmp_path: Path) -> None:
    learned = make_run(tmp_path / "learned", Made(logged=1, pictured=0))
    random = make_run(tmp_path / "random", Made(policy="random", logged=1, pictured=0))
    config = yaml.safe_load((random / "config.yaml").read_text())
    config["data"]["workers"] += 3
    (random / "config.yaml").write_text(yaml.safe_dump(config))
    table = result_table(read_runs([learned, random]))
    assert table is not None and "random mask" in table.note


def test_results_on_other_data_are_not_compared(tmp_path: Path) -> None:
    learned = make_run(tmp_path / "learned", Made(logged=1, pictured=0))
    random = make_run(tmp_path / "random", Made(policy="random", logged=1, pictured=0))
    config = (random / "config.yaml").read_text().replace("data/cifar10", "data/other")
    (random / "config.yaml").write_text(config)
    table = result_table(read_runs([learned, random]))
    assert table is not None and table.note == ""
    assert [score.change for score in column(table, "k-NN accuracy")] == ["", ""]


def test_no_results_no_table(runs: list[Run]) -> None:
    assert result_table(runs[-1:]) is None
    assert seed_table(runs[-1:]) is None


def test_means_over_seeds(runs: list[Run]) -> None:
    table = seed_table(runs)
    assert table is not None
    assert [value.text for value in column(table, "Runs")] == ["learned-0, learned-1", "random-1, random-0"]
    assert [value.text for value in column(table, "Seeds")] == ["2", "2"]
    spread = 100 * stdev([0.465, 0.469])
    assert column(table, "k-NN accuracy")[0].text == f"46.70 ± {spread:.2f} %"
    # A seed that was run twice is no third one.
    again = seed_table([runs[0], runs[1], runs[0]])
    assert again is not None
    assert [value.text for value in column(again, "Seeds")] == ["2"]
    assert column(again, "k-NN accuracy")[0].text == f"46.70 ± {spread:.2f} %"


def test_runs_of_one_seed_or_of_other_data_are_no_repetitions(runs: list[Run], tmp_path: Path) -> None:
    assert seed_table([runs[0], runs[3]]) is None
    paths = [make_run(tmp_path / str(seed), Made(seed=seed, logged=1, pictured=0)) for seed in (0, 1)]
    config = (paths[1] / "config.yaml").read_text().replace("data/cifar10", "data/other")
    (paths[1] / "config.yaml").write_text(config)
    assert seed_table(read_runs(paths)) is None


def test_evaluations_by_task_and_class(runs: list[Run]) -> None:
    (finetune, no_classes), (segment, classes) = evaluation_tables(runs)
    assert (finetune.title, segment.title) == ("Fine-tuning", "Segmentation")
    assert no_classes is None and classes is not None
    assert len(finetune.rows) == 8 and len(segment.rows) == 4
    assert [value.text for value in column(finetune, "Encoder")][:2] == ["pretrained", "from scratch"]
    losses = [value.key for value in column(finetune, "Loss")]
    best = [value.best for value in column(finetune, "Loss")]
    assert best.index(True) == losses.index(min(losses))
    assert column(finetune, "Finished (UTC)")[0].text == "2026-11-28 10:30"
    assert column(finetune, "Folder")[1].text == "finetune-scratch"
    assert [row.cells[0].text for row in classes.rows] == ["sky", "road", "sign"]
    assert classes.rows[2].cells[1].key is None
    assert len(classes.columns) == 5


def test_numeric_columns(runs: list[Run]) -> None:
    table = result_table(runs)
    assert table is not None
    numeric = dict(zip(table.columns, table.numeric, strict=True))
    assert numeric["k-NN accuracy"] and numeric["Seed"] and not numeric["Run"] and not numeric["Mask"]


def test_differences_between_runs_come_out(runs: list[Run]) -> None:
    found = {setting.name: setting for setting in settings([runs[0], runs[2]])}
    assert {name for name, setting in found.items() if setting.differs} == {"seed", "masking.policy"}
    assert found["masking.policy"].values == ["learned", "random"]
    assert found["pretrain.betas"].values == ["[0.9, 0.95]"] * 2
    assert len(found) > 80


def test_of_a_single_run_what_is_no_default_comes_out(runs: list[Run]) -> None:
    differing = {setting.name: setting.values for setting in settings(runs[:1]) if setting.differs}
    assert differing["model.arch"] == ["vit_micro"] and "masking.ratio" not in differing


def test_machine(runs: list[Run]) -> None:
    table = machine_table(runs)
    rows = {row.cells[0].text: [cell.text for cell in row.cells[1:]] for row in table.rows}
    assert [text.replace("\N{NO-BREAK SPACE}", " ") for text in rows["Training time"]] == [
        *["57 min 16 s"] * 4, "\N{EN DASH}"
    ]  # fmt: skip
    assert rows["torch"] == ["2.14.1"] * 5
    assert "Attempts (Slurm)" not in rows


def test_card_of_a_finished_run(runs: list[Run]) -> None:
    shown = card(runs[0])
    figures = {figure.name: figure.text.replace("\N{NO-BREAK SPACE}", " ") for figure in shown.figures}
    assert figures == {
        "k-NN accuracy": "46.5 %",
        "Linear probe": "55.5 %",
        "Fine-tuned": "53.5 %",
        "Segmentation mIoU": "32.0 %",
    }
    assert shown.status == "complete, 80 iterations" and shown.share == 1
    (tuned,) = (figure for figure in shown.figures if figure.name == "Fine-tuned")
    assert tuned.remark.replace("\N{NO-BREAK SPACE}", " ") == "from scratch 39.0 %"


def test_card_shows_the_latest_of_several_evaluations(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", Made(logged=1, pictured=0))
    lines = [{"task": "knn", "accuracy": score} for score in (0.9, 0.5)]
    (path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shown = card(read_runs([path])[0]).figures[-1]
    assert (shown.text, shown.remark) == ("50.0\N{NO-BREAK SPACE}%", "the latest of 2")


def test_card_of_a_run_on_its_way(runs: list[Run]) -> None:
    shown = card(runs[-1])
    assert shown.status == "iteration 40 of 100" and shown.share == 0.4
    assert [figure.name for figure in shown.figures] == ["Mask loss", "Head accuracy", "Reconstruction error"]
