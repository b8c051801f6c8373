"""What a report reads of run directories, and what it says about those that it cannot read."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mlomae.errors import UserError
from mlomae.report.lines import read_lines
from mlomae.report.reading import LAST_LINES, read_runs, run_names
from tests.report.made import Made, make_run

BARE = Made(logged=12, every=5, pictured=0)


def test_a_finished_run_is_read_as_it_was_written(tmp_path: Path) -> None:
    (run,) = read_runs([make_run(tmp_path / "a", BARE)])
    assert (run.name, run.policy, run.learns, run.step) == ("a", "learned", True, 60)
    assert run.grid == (8, 8)
    assert run.scalars["loss/pretrain"].steps.tolist() == list(range(5, 61, 5))
    assert run.result is not None and run.result["seed"] == 0
    assert [row["task"] for row in run.evaluations] == ["finetune", "finetune", "segment"]
    assert run.environment is not None and run.environment["torch"] == "2.14.1"


def test_frequency_is_the_mean_of_the_last_lines(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", BARE)
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    expected = np.mean([row["mask/frequency"] for row in rows[-LAST_LINES:]], axis=0)
    (run,) = read_runs([path])
    np.testing.assert_allclose(run.frequency, expected)


def test_only_the_configuration_is_needed(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", BARE)
    for entry in path.iterdir():
        if entry.name != "config.yaml":
            entry.unlink()
    (run,) = read_runs([path])
    assert (run.scalars, run.step, run.frequency, run.result) == ({}, 0, None, None)
    assert (run.evaluations, run.environment, run.attempts) == ([], None, 0)


def test_null_is_a_gap_and_a_repeated_step_counts_as_it_was_last(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", BARE)
    lines = [
        {"step": 1, "x": 1.0},
        {"step": 2, "x": None},
        {"step": 3},
        {"step": 1, "x": 4},
        {"step": 5, "x": "?"},
    ]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run,) = read_runs([path])
    assert run.scalars["x"].steps.tolist() == [1, 2]
    np.testing.assert_array_equal(run.scalars["x"].values, [4, np.nan])
    assert run.step == 5


def test_fields_newer_than_the_run_have_their_defaults(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", BARE)
    kept = (path / "config.yaml").read_text().replace("  ratio: 0.75\n", "")
    assert "  ratio:" not in kept
    (path / "config.yaml").write_text(kept)
    (run,) = read_runs([path])
    assert run.removed_share == 0.75


def test_share_of_removed_patches_is_that_of_whole_patches(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", Made(side=12, logged=2, pictured=0))
    (run,) = read_runs([path])
    assert run.removed_share == 7 / 9


def test_partial_last_line_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text('{"a": 1}\n\n{"a": 2}\n{"a": 3')
    assert [row for _, row in read_lines(path)] == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1}\n{"a": 2}')
    assert [row for _, row in read_lines(path)] == [{"a": 1}, {"a": 2}]
    assert list(read_lines(tmp_path / "none")) == []


@pytest.mark.parametrize("text", ['{"a": \n{"a": 2}\n', '[1]\n{"a": 2}\n', "\x00\xff\n{}\n"])
def test_other_damaged_line_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lines"
    path.write_text('{"a": 1}\n' + text)
    with pytest.raises(UserError, match=r"lines: line 2.* expected a JSON object"):
        list(read_lines(path))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metrics.jsonl", "{}\n", "metrics.jsonl: line 1: found step None, expected a whole number"),
        ("metrics.jsonl", '{"step": 1, "mask/frequency": [1]}\n', "has 1 numbers, config.yaml 64 patches"),
        ("metrics.jsonl", '{"step": 1, "mask/frequency": ["a"]}\n', "mask/frequency is damaged"),
        ("result.json", "", "result.json is damaged: found '', expected a JSON object"),
        ("evaluations.jsonl", "x\n", "evaluations.jsonl: line 1 is damaged"),
        ("environment.json", "[]", "environment.json: found '[]', expected a JSON object"),
        ("config.yaml", "masking: [", "config.yaml: cannot be read"),
        ("config.yaml", "encoder: x", "not the configuration of a run"),
    ],
)
def test_damaged_file_is_one_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = make_run(tmp_path / "a", BARE)
    (path / name).write_text(content)
    with pytest.raises(UserError) as caught:
        read_runs([path])
    assert message in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none: no such folder"):
        read_runs([tmp_path / "none"])
    with pytest.raises(UserError, match=r"not a run directory \(no config.yaml\)"):
        read_runs([tmp_path])


def test_names_are_as_long_as_they_must_be() -> None:
    paths = [Path("/x/a/run"), Path("/x/b/run"), Path("/x/b/other"), Path("/run")]
    assert run_names(paths) == ["a/run", "b/run", "other", "/run"]
    assert run_names([Path("/x/a")]) == ["a"]


def test_a_run_is_given_once(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="given twice"):
        run_names([tmp_path / "a", tmp_path / "b" / ".." / "a"])
