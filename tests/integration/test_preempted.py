"""A run that a signal stops leaves with its own exit code, and ends later as if nobody had stopped it."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from mlomae import checkpoint, loggers, trainer
from mlomae.arguments import EXIT_OK, EXIT_PREEMPTED
from mlomae.cli import main
from mlomae.data import decoding
from mlomae.trainer import Trainer
from tests.integration.test_resume import ROOT, interrupt
from tests.integration.tiny import FEW_TO_FIT, read_metrics, read_result, without_pictures, write_recipe

ITERATIONS = 12
# Log lines and checkpoints fall on other iterations than the signals below.
SCHEDULE = {
    **FEW_TO_FIT,
    "iterations": ITERATIONS,
    "log_every": 5,
    "checkpoint_every": 4,
    "data.augment": "shift",
}


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_recipe(tmp_path_factory.mktemp("recipe") / "tiny.yaml", SCHEDULE)


@pytest.fixture(scope="module")
def undisturbed(recipe: Path) -> Path:
    assert start(recipe, recipe.parent / "undisturbed") == EXIT_OK
    return recipe.parent / "undisturbed"


def start(recipe: Path, run_dir: Path, *more: str) -> int:
    return main(["train", "--config", str(recipe), "--run-dir", str(run_dir), *more])


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def signal_in(monkeypatch: pytest.MonkeyPatch, number: signal.Signals, iteration: int) -> None:
    """Sends the signal in the middle of one outer iteration."""
    iterate = Trainer.iterate

    def interrupted(self: Trainer, current: int) -> Any:
        if current == iteration:
            send(number)
        return iterate(self, current)

    monkeypatch.setattr(Trainer, "iterate", interrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("iteration", [0, 5, 7, ITERATIONS - 1])
def test_training_goes_on_where_it_was_stopped(
    iteration: int,
    number: signal.Signals,
    recipe: Path,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patch:
        signal_in(patch, number, iteration)
        assert start(recipe, tmp_path) == EXIT_PREEMPTED

    # The iteration was finished and is saved, the one after it was not begun.
    assert capsys.readouterr().err == (
        f"mlomae: stopped by {number.name} after iteration {iteration + 1}, which is saved; "
        "the same command goes on\n"
    )
    newest = checkpoint.newest(tmp_path / "checkpoints")
    assert newest is not None and checkpoint.read(newest).step == iteration + 1
    assert not (tmp_path / "result.json").exists()
    assert start(recipe, tmp_path) == EXIT_OK
    assert_same_run(tmp_path, undisturbed)


def assert_same_run(actual: Path, expected: Path) -> None:
    assert read_metrics(actual) == read_metrics(expected)
    assert read_result(actual) == read_result(expected)
    last = f"checkpoints/step-{ITERATIONS:08d}"
    for name in ("encoder.safetensors", f"{last}/training.safetensors"):
        found, wanted = load_file(actual / name), load_file(expected / name)
        assert found.keys() == wanted.keys()
        assert [key for key in wanted if not found[key].equal(wanted[key])] == []


def test_the_evaluation_stops_at_once_and_is_repeated(
    recipe: Path, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "score_features", lambda *given: send(signal.SIGUSR1))
        assert start(recipe, tmp_path) == EXIT_PREEMPTED
    assert not (tmp_path / "result.json").exists()

    assert start(recipe, tmp_path) == EXIT_OK
    assert_same_run(tmp_path, undisturbed)


def test_a_run_that_has_not_begun_stops_at_once(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trainer, "LevelLoaders", lambda *given: send(signal.SIGTERM))

    assert start(recipe, tmp_path / "run") == EXIT_PREEMPTED

    assert capsys.readouterr().err.startswith("mlomae: stopped by SIGTERM; the same command goes on")
    assert not (tmp_path / "run").exists()


def test_a_signal_while_an_image_is_decoded_does_not_damage_it(
    fill_images: Callable[..., Path], recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert, evaluate, due, sent = decoding._convert, Trainer.evaluate, list[int](), list[int]()

    def interrupted(*given: Any) -> Any:
        if due and not sent:  # a later one might find nobody who handles it, and end the tests
            sent.append(1)
            send(signal.SIGUSR1)
        return convert(*given)

    monkeypatch.setattr(decoding, "_convert", interrupted)
    monkeypatch.setattr(Trainer, "evaluate", lambda trainer: (due.append(1), evaluate(trainer))[1])
    more = ["--data.dataset", "folder", "--data.path", str(fill_images(mode="L"))]
    more += ["--data.workers", "0", "--data.resident", "never", "--data.test_fraction", "0.3"]

    assert start(recipe, tmp_path / "run", *more) == EXIT_PREEMPTED
    assert sent
    assert not list(tmp_path.rglob("bad_samples.jsonl"))


def test_a_signal_while_a_logger_is_opened_is_no_error_of_it(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(loggers._OPEN, "tensorboard", lambda *given: send(signal.SIGTERM))
    assert start(recipe, tmp_path / "run", "--loggers", "[tensorboard]") == EXIT_PREEMPTED


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_all_processes_of_a_run_spares_the_loaders(
    number: signal.Signals, recipe: Path, tmp_path: Path
) -> None:
    long = ["--iterations", "100000", "--data.workers", "1", "--data.resident", "never"]
    command = [sys.executable, ROOT / "train.py", "--config", recipe, "--run-dir", tmp_path / "run", *long]

    code, errors = interrupt([str(word) for word in command], tmp_path / "run", 10, number)

    assert code == EXIT_PREEMPTED
    assert errors.startswith(f"mlomae: stopped by {number.name} after iteration ")
    assert len(errors.splitlines()) == 1
