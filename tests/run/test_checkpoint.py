"""Checkpoints come back bit for bit, survive kills at any moment, and damaged ones are passed over."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from mlomae import checkpoint
from mlomae.checkpoint import Checkpoint, latest, match, save
from mlomae.errors import UserError


def save_steps(folder: Path, *steps: int, keep: int = 10) -> None:
    for step in steps:
        save(folder, step, {"w": torch.full((40,), float(step))}, {"step": step}, keep)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().clone().reshape(-1).view(torch.uint8).tolist())


def latest_quietly(folder: Path) -> Checkpoint | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return latest(folder)


def test_round_trip_is_bit_exact(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(64, generator=generator)
    matrix = torch.randn(5, 7, generator=generator)
    tensors = {
        "matrix": matrix,
        "transposed": matrix.t(),
        "bf16": matrix.to(torch.bfloat16),
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "ids": torch.arange(5),
        "flag": torch.tensor(True),
        "count": torch.tensor(3.0, dtype=torch.float64),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "shard.0": flat[:32],
        "shard.1": flat[32:],
        "tied": flat,
        "expanded": torch.ones(1).expand(4),
    }
    state = {"step": 200, "nested": {"lr": 0.1 + 0.2}, "names": ["a", None]}
    path = save(tmp_path / "checkpoints", 200, tensors, state, keep=1)
    found = latest_quietly(tmp_path / "checkpoints")
    assert found is not None
    assert (found.path, found.step, found.state) == (path, 200, state)
    assert path.name == "step-00000200"
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found.tensors[name].dtype, found.tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(found.tensors[name]) == bits(tensor), name


def test_only_tensors_that_need_it_are_copied() -> None:
    flat = torch.zeros(64)
    tensors = {"a": flat[:32], "b": flat[32:], "again": flat[16:48], "strided": flat[::2]}
    separate = checkpoint._separate(tensors)
    kept = {name for name in tensors if separate[name].data_ptr() == tensors[name].data_ptr()}
    assert kept == {"a", "b"}


def test_changing_a_loaded_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    found = latest(tmp_path)
    assert found is not None
    found.tensors["w"].zero_()
    again = latest_quietly(tmp_path)
    assert again is not None
    assert bool((again.tensors["w"] == 1).all())


def test_nothing_saved_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path / "checkpoints") is None
    assert latest(tmp_path) is None


def test_pruning_keeps_the_newest(tmp_path: Path) -> None:
    save_steps(tmp_path, 90, 100, 1100, 200, keep=2)
    assert names(tmp_path) == ["step-00000100", "step-00000200", "step-00001100"]
    save_steps(tmp_path, 1200, keep=2)
    assert names(tmp_path) == ["step-00001100", "step-00001200"]
    save_steps(tmp_path, 1300, keep=1)
    assert names(tmp_path) == ["step-00001300"]


def test_pruning_does_not_count_incomplete_ones(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    (tmp_path / "step-00000002" / "state.json").unlink()
    save_steps(tmp_path, 3, keep=2)
    assert names(tmp_path) == ["step-00000001", "step-00000003"]


def test_remains_of_dead_runs_are_swept(tmp_path: Path) -> None:
    (tmp_path / ".tmp-5-1").mkdir()
    (tmp_path / ".tmp-5-1" / "tensors.safetensors").write_bytes(b"half")
    save_steps(tmp_path, 6)
    assert names(tmp_path) == ["step-00000006"]


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", [flip_byte, truncate, Path.unlink])
def test_damaged_checkpoint_is_passed_over(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    save_steps(tmp_path, 1, 2, 3)
    damage(tmp_path / "step-00000003" / name)
    with pytest.warns(UserWarning, match="step-00000003: skipped") as caught:
        found = latest(tmp_path)
    assert len(caught) == 1
    assert found is not None
    assert (found.step, found.state) == (2, {"step": 2})
    # The run comes by that step again and repairs it.
    save_steps(tmp_path, 3)
    repaired = latest_quietly(tmp_path)
    assert repaired is not None
    assert repaired.step == 3


def test_other_format_and_wrong_place_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_steps(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000009")
    with pytest.warns(UserWarning, match="is of step 1"):
        found = latest(tmp_path)
    assert found is not None
    assert found.step == 1
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    with pytest.warns(UserWarning, match="format 1, this version reads 2"):
        assert latest(tmp_path) is None


def test_a_checkpoint_can_be_loaded_at_every_line_of_a_save(tmp_path: Path) -> None:
    save_steps(tmp_path, 6, 7, keep=2)
    seen: list[tuple[int, str]] = []

    def look(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in (checkpoint.__file__, shutil.__file__):
            return None
        assert all((path / "manifest.json").exists() for path in tmp_path.glob("step-*"))
        found = latest_quietly(tmp_path)
        seen.append((found.step, found.state.get("version", "old")) if found else (0, "none"))
        return look

    tracing = sys.gettrace()
    sys.settrace(look)
    try:
        save(tmp_path, 7, {"w": torch.zeros(3)}, {"version": "new"}, keep=2)
        save(tmp_path, 8, {"w": torch.zeros(3)}, {"version": "new"}, keep=1)
    finally:
        sys.settrace(tracing)
    assert sorted(set(seen), key=seen.index) == [(7, "old"), (7, "new"), (8, "new")]
    assert seen == sorted(seen, key=lambda state: (state[0], state[1] == "new"))
    assert names(tmp_path) == ["step-00000008"]


def test_failed_save_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(tmp_path, 1)

    def fail(path: Path) -> str:
        raise OSError("disk gone")

    monkeypatch.setattr(checkpoint, "_sha256", fail)
    with pytest.raises(OSError, match="disk gone"):
        save_steps(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


def test_kills_at_random_moments_never_lose_a_checkpoint(tmp_path: Path) -> None:
    program = Path(__file__).with_name("interrupted_saves.py")
    done = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def loaded(**shapes: tuple[int, ...]) -> Checkpoint:
    return Checkpoint(
        Path("runs/x/step-1"), 1, {name: torch.zeros(shape) for name, shape in shapes.items()}, {}
    )


def test_match_accepts_the_same_model() -> None:
    match(loaded(weight=(2, 3), scale=()), {"weight": (2, 3), "scale": ()})


@pytest.mark.parametrize(
    ("expected", "reason"),
    [
        ({"a": (1, 17, 96), "b": (2,)}, "a is [1, 65, 96] there, [1, 17, 96] here"),
        ({"a": (1, 65, 96), "b": (2,), "c": (1,)}, "c is missing there"),
        ({"a": (1, 65, 96)}, "b is there, not expected here"),
        ({"c": (1,)}, "c is missing there; a is there, not expected here; b is there, not expected here"),
    ],
)
def test_match_names_what_differs(expected: dict[str, tuple[int, ...]], reason: str) -> None:
    with pytest.raises(UserError) as caught:
        match(loaded(a=(1, 65, 96), b=(2,)), expected)
    assert str(caught.value) == f"checkpoint runs/x/step-1: is of another model ({reason})"
