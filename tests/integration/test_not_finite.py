"""A run that breaks says which level broke when, and leaves the last good checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mlomae import checkpoint, levels
from mlomae.cli import main
from tests.integration.tiny import without_pictures, write_recipe

STEPS: dict[str, Any] = {
    "pretrain": levels.PretrainLevel,
    "head": levels.HeadLevel,
    "mask": levels.MaskLevel,
}
BREAKS_AT = 5


def run(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any]
) -> str:
    """Runs the tiny recipe into ``folder/run``; returns the line it stops with."""
    without_pictures(monkeypatch)
    recipe = write_recipe(folder / "tiny.yaml", fields)
    code = main(["train", "--config", str(recipe), "--run-dir", str(folder / "run")])
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert not (folder / "run" / "result.json").exists()
    return line


@pytest.mark.parametrize("level", STEPS)
def test_an_exploding_rate_names_its_level(
    level: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = run(tmp_path, capsys, monkeypatch, {f"{level}.lr": 1e20, "checkpoint_every": 1})

    assert line == (
        f"mlomae: error: {level} level: the loss or the weights are not finite at iteration 0; "
        f"checkpoints from before stay; try a lower {level}.lr or set {level}.clip"
    )
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize("checkpoint_every", [1, 2, 4])
@pytest.mark.parametrize("level", STEPS)
def test_the_last_good_checkpoint_survives(
    level: str,
    checkpoint_every: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step = STEPS[level].step

    def breaking_step(self: Any, *args: Any) -> Any:
        outcome = step(self, *args)  # its loss is finite: the weights break after it
        if next(value for value in args if type(value) is int) == BREAKS_AT:
            with torch.no_grad():
                next(iter(self.engine.module.parameters())).fill_(float("nan"))
        return outcome

    monkeypatch.setattr(STEPS[level], "step", breaking_step)
    fields = {"iterations": 12, "log_every": 4, "checkpoint_every": checkpoint_every}

    line = run(tmp_path, capsys, monkeypatch, fields)

    assert f"{level} level: " in line
    assert f"at iteration {BREAKS_AT};" in line
    path = checkpoint.newest(tmp_path / "run" / "checkpoints")
    assert path is not None
    loaded = checkpoint.read(path)
    assert loaded.step == BREAKS_AT // checkpoint_every * checkpoint_every
    weights = {**loaded.tensors, **load_file(tmp_path / "run" / "encoder.safetensors")}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
