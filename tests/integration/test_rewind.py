"""Steps that are skipped, and runs that go back to their last checkpoint, because something is not finite."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mlomae import checkpoint, levels
from mlomae.errors import NotFinite
from tests.integration.tiny import read_metrics, tiny_config, train, without_pictures

STEPS: dict[str, Any] = {
    "pretrain": levels.PretrainLevel,
    "head": levels.HeadLevel,
    "mask": levels.MaskLevel,
}
FIELDS: dict[str, Any] = {"iterations": 8, "data.workers": 0}
Break = Callable[[str, Callable[[Any], object], int], list[int]]


@pytest.fixture
def breaking(monkeypatch: pytest.MonkeyPatch) -> Break:
    """``breaking(level, break_it, times)``: from iteration 5 on, the first ``times`` steps are broken.

    Returns the iterations at which a step was broken.
    """

    def arrange(level: str, break_it: Callable[[Any], object], times: int) -> list[int]:
        step, broken = STEPS[level].step, list[int]()

        def breaking_step(self: Any, *args: Any) -> Any:
            iteration = next(value for value in args if type(value) is int)
            outcome = step(self, *args)
            if iteration >= 5 and len(broken) < times:
                broken.append(iteration)
                break_it(self)
            return outcome

        monkeypatch.setattr(STEPS[level], "step", breaking_step)
        return broken

    without_pictures(monkeypatch)
    return arrange


def break_weights(level: Any) -> None:
    with torch.no_grad():
        next(iter(level.engine.module.parameters())).fill_(float("nan"))


def break_next_gradient(level: Any) -> None:
    """That of the next step only."""
    engine, accumulate = level.engine, level.engine.accumulate

    def accumulate_nan(loss: torch.Tensor) -> None:
        accumulate(loss * float("nan"))
        engine.accumulate = accumulate

    engine.accumulate = accumulate_nan


def run(folder: Path, **fields: Any) -> int:
    """Trains in ``folder``; returns the iterations done."""
    beside = {name.replace("__", "."): value for name, value in fields.items()}
    return train(tiny_config({**FIELDS, **beside, "run_dir": folder})).iteration


def weights(run: Path, step: int) -> dict[str, torch.Tensor]:
    return dict(checkpoint.read(run / "checkpoints" / f"step-{step:08d}").tensors)


@pytest.mark.parametrize("level", STEPS)
def test_a_step_without_a_finite_gradient_is_skipped(level: str, tmp_path: Path, breaking: Break) -> None:
    breaking(level, break_next_gradient, 1)
    assert run(tmp_path, checkpoint_every=1, keep_checkpoints=9) == 8

    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    # Two pretrain steps are one iteration: the next one is the second of it.
    at = 6 if level == "pretrain" else 7
    assert [row["skipped_steps"] for row in rows] == [float(step >= at) for step in range(1, 9)]
    assert all(row["rewinds"] == 0 for row in rows)
    # A bad iteration leaves no checkpoint.
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {
        f"step-{step:08d}" for step in range(1, 9) if step != at
    }
    before, after = (weights(tmp_path, step) for step in (at - 1, 8))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in after.values())
    assert not torch.equal(before[f"{level}.step"], after[f"{level}.step"])


@pytest.mark.parametrize("level", STEPS)
def test_a_broken_level_goes_back_and_on_with_the_next_data(
    level: str, tmp_path: Path, breaking: Break, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = breaking(level, break_weights, 1)
    assert run(tmp_path) == 8 and broken == [5]
    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows] == list(range(1, 9))
    assert [row["rewinds"] for row in rows] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert all(row["loss/pretrain"] is not None for row in rows)
    assert (
        f"{level} level: the loss or the weights are not finite at iteration 5; back to iteration 4 (1 of 2)"
        in (capsys.readouterr().out)
    )
    # Two batches of the pretrain level were read before it broke, and are not read again.
    loaded = checkpoint.read(tmp_path / "checkpoints" / "step-00000008")
    assert loaded.state["rewinds"] == 1
    assert loaded.state["streams"]["pretrain"]["next"] == 2 * (8 + 2)


def test_a_run_goes_back_so_often_and_no_more(tmp_path: Path, breaking: Break) -> None:
    broken = breaking("head", break_weights, 99)
    with pytest.raises(NotFinite, match=r"^head level: "):
        run(tmp_path, failure__rewinds=3)
    assert broken == [5] * 4


def test_skipped_steps_are_counted_over_restarts(tmp_path: Path, breaking: Break) -> None:
    breaking("pretrain", break_next_gradient, 1)
    run(tmp_path, checkpoint_every=1, keep_checkpoints=9)
    rows = read_metrics(tmp_path)
    assert rows[-1]["skipped_steps"] == 1
    # As if it had been killed before its last checkpoint.
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000008")
    run(tmp_path, checkpoint_every=1, keep_checkpoints=9)
    assert read_metrics(tmp_path) == rows


def test_returns_are_counted_over_restarts(tmp_path: Path, breaking: Break) -> None:
    assert breaking("mask", break_weights, 1) == []
    run(tmp_path, failure__rewinds=1)
    # As if it had been killed before its last checkpoint.
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000008")
    broken = breaking("mask", break_weights, 1)
    with pytest.raises(NotFinite):
        run(tmp_path, failure__rewinds=1)
    assert broken == [6]


def test_nothing_is_passed_over_where_it_is_not_allowed(tmp_path: Path, breaking: Break) -> None:
    breaking("head", break_next_gradient, 1)
    with pytest.raises(NotFinite, match=r"^head level: .* at iteration 6;"):
        run(tmp_path, failure__skips=0, failure__rewinds=0)


def test_a_jump_of_the_loss_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    without_pictures(monkeypatch)
    step_masked = levels.PretrainLevel.step_masked

    def jumping(self: Any, masked: Any, iteration: int, record: bool = False) -> Any:
        masked, metrics = step_masked(self, masked, iteration, record)
        factor = 50.0 if iteration == 10 else 1.0
        return masked, metrics | {"loss/pretrain": factor * metrics["loss/pretrain"]}

    monkeypatch.setattr(levels.PretrainLevel, "step_masked", jumping)
    run(tmp_path, iterations=12)

    rows = read_metrics(tmp_path)
    assert [row["step"] for row in rows if row["loss_jumps"]] == [11]
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "jumped" in line]
    assert line.startswith("pretrain level: its loss jumped from ") and line.endswith(" by iteration 11")
    for row in rows:
        assert row["peak_loss/pretrain"] >= row["loss/pretrain"]
        assert row["gradient_norm/pretrain"] > 0 and row["gradient_norm/head"] > 0
