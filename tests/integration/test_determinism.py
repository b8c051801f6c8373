"""``--deterministic``: the same bits in two processes, and no operation that could give others."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mlomae import checkpoint
from mlomae.config_arguments import overrides
from mlomae.determinism import require_determinism
from mlomae.errors import UserError
from tests.architecture.source_tree import ROOT
from tests.integration.tiny import FEW_TO_FIT, read_metrics, write_recipe


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Switched on, and off again."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    require_determinism()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = fill


def test_operations_without_a_repeatable_form_are_refused(deterministic: None) -> None:
    target, index = torch.zeros(4), torch.tensor([0, 0])
    with pytest.raises(RuntimeError, match="deterministic"):
        target.put_(index, torch.ones(2))


def trained(tmp_path: Path, device: str, name: str, *flags: str) -> tuple[dict[str, torch.Tensor], list[Any]]:
    """A run in a process of its own: the tensors of its last checkpoint, and its log."""
    fields = {**FEW_TO_FIT, "device": device, "loggers": [], "masking.network": "mlp"}
    recipe, run = write_recipe(tmp_path / "tiny.yaml", fields), tmp_path / name
    words = ["train", "--config", str(recipe), "--run-dir", str(run), "--quiet", *flags]
    subprocess.run([sys.executable, "-m", "mlomae", *words], cwd=ROOT, check=True)
    path = checkpoint.newest(run / "checkpoints")
    assert path is not None
    assert f"deterministic: {str(bool(flags)).lower()}\n" in (run / "config.yaml").read_text()
    return checkpoint.read(path).tensors, read_metrics(run)


@pytest.mark.slow
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_processes_give_the_same_bits_and_on_a_cpu_the_flag_changes_none(device: str, tmp_path: Path) -> None:
    runs = [trained(tmp_path, device, name, "--deterministic") for name in ("first", "second")]
    if device == "cpu":
        runs.append(trained(tmp_path, device, "without"))
    (tensors, lines), *others = runs
    for other, other_lines in others:
        assert all(torch.equal(tensors[name], other[name]) for name in tensors)
        assert lines == other_lines


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (["--deterministic"], {"deterministic": "true"}),
        (["--deterministic", "--seed", "3"], {"deterministic": "true", "seed": "3"}),
        (["--deterministic", "false"], {"deterministic": "false"}),
        (["--deterministic=false"], {"deterministic": "false"}),
    ],
)
def test_a_flag_that_is_true_or_false_may_stand_alone(words: list[str], fields: dict[str, Any]) -> None:
    assert overrides(words, {"deterministic"}) == fields


def test_no_other_flag_may() -> None:
    for words in (["--seed"], ["--seed", "--deterministic"]):
        with pytest.raises(UserError, match=r"^--seed: no value given$"):
            overrides(words, {"deterministic"})
