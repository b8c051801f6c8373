"""What the surroundings do to an evaluation: one line, and the same command ends as if nothing had been."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch

from mlomae.arguments import EXIT_OK, EXIT_USER_ERROR
from mlomae.cli import main
from mlomae.downstream import finetune, linear

FINETUNE = ["--optim.epochs=1", "--optim.batch_size=700", "--device=cpu"]
LINEAR = ["--epochs=1", "--device=cpu"]


@pytest.mark.parametrize(
    ("task", "module", "words", "error", "told"),
    [
        (
            "finetune", finetune, FINETUNE, torch.OutOfMemoryError("CUDA out of memory."),
            "out of memory in finetune: lower optim.batch_size; the same command goes on",
        ),
        (
            "linear", linear, LINEAR, RuntimeError("[…] can't allocate memory: …"),
            "out of memory in linear: lower encoder_batch or batch_size; the same command goes on",
        ),
        (
            "finetune", finetune, FINETUNE, RuntimeError("DataLoader worker (pid 7) is killed by signal"),
            "data.workers: a loader process ended without a word in finetune, perhaps for want of memory",
        ),
        (
            "linear", linear, LINEAR, OSError(errno.EIO, "Input/output error", "a.png"),
            "a.png: cannot be read or written (Input/output error); the same command goes on",
        ),
        (
            "linear", linear, LINEAR, OSError(errno.ENOSPC, "No space left", "x.json"),
            "x.json: cannot be written (No space left); the same command goes on",
        ),
    ],
    ids=["memory of a GPU", "memory", "loader", "broken disk", "full disk"],
)  # fmt: skip
def test_a_fault_is_one_line_and_the_same_command_goes_on(
    task: str, module: object, words: list[str], error: Exception, told: str, digits_run: Path,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    shutil.copytree(digits_run, tmp_path / "run")
    command = ["eval", task, str(tmp_path / "run"), *words]

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(module, "run", fail)
        assert main(command) == EXIT_USER_ERROR
    line = capsys.readouterr().err
    assert line.startswith(f"mlomae: error: {told}") and line.count("\n") == 1

    assert main(command) == EXIT_OK
    (result,) = (tmp_path / "run").glob("eval/*/result.json")
    assert "accuracy" in json.dumps(json.loads(result.read_text()))
