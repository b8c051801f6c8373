"""Checkpoints come back bit for bit, survive kills at any moment, and damaged ones are passed over."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mlomae import checkpoint, checkpoint_file, checkpoint_folder
from mlomae.checkpoint import Checkpoint, Score, best, match, newest, read, save
from mlomae.errors import UserError

FILES = ["encoder.safetensors", "training.safetensors", "state.json", "manifest.json"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def values(step: int) -> dict[str, Tensor]:
    return {
        "pretrain.weight.encoder.w": torch.full((40,), float(step)),
        "head.weight.w": torch.full((2, 3), -float(step)),
    }


def save_steps(folder: Path, *steps: int, keep: int = 10, scores: Mapping[int, float] | None = None) -> None:
    for step in steps:
        score = Score("loss", scores[step]) if scores and step in scores else None
        save(folder, step, values(step), {"step": step}, keep, score)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def steps(folder: Path) -> list[int]:
    """Those of the checkpoints; nothing else may be there."""
    return [int(name.removeprefix("step-")) for name in names(folder)]


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().clone().reshape(-1).view(torch.uint8).tolist())


def newest_quietly(folder: Path) -> Checkpoint | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path = newest(folder)
    return None if path is None else read(path)


def test_round_trip_is_bit_exact(folder: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(64, generator=generator)
    tensors = {
        "pretrain.weight.encoder.blocks.0.w": torch.randn(5, 7, generator=generator),
        "pretrain.weight.encoder.norm.b": torch.zeros(3, dtype=torch.bfloat16),
        "pretrain.weight.decoder.w": flat,
        "pretrain.exp_avg.encoder.blocks.0.w": flat[:32].t(),
        "pretrain.step": torch.tensor(3.0),
        "head.weight.w": flat[16:],
    }
    state = {"step": 200, "nested": {"lr": 0.1 + 0.2}, "names": ["a", None]}
    path = save(folder, 200, tensors, state, keep=1, score=Score("loss/mask", 0.25))
    found = newest_quietly(folder)
    assert found is not None
    assert (found.path, found.step, found.state) == (path, 200, state)
    assert found.score == Score("loss/mask", 0.25)
    assert path == folder / "step-00000200"
    assert names(path) == sorted(FILES)
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found.tensors[name].dtype, found.tensors[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(found.tensors[name]) == bits(tensor), name
    assert set(found.part("head")) == {"weight.w"}


def test_the_encoder_is_a_file_of_its_own_and_published(folder: Path) -> None:
    save_steps(folder, 1, 2)
    for path in (folder.parent / "encoder.safetensors", folder / "step-00000002" / "encoder.safetensors"):
        weights = load_file(path)
        assert weights.keys() == {"w"}
        assert bool((weights["w"] == 2).all())
    assert load_file(folder / "step-00000002" / "training.safetensors").keys() == {"head.weight.w"}


def test_changing_a_read_tensor_leaves_the_file_alone(folder: Path) -> None:
    save_steps(folder, 1)
    found = newest_quietly(folder)
    assert found is not None
    found.tensors["head.weight.w"].zero_()
    again = newest_quietly(folder)
    assert again is not None
    assert bool((again.tensors["head.weight.w"] == -1).all())


def test_nothing_saved_is_none(folder: Path) -> None:
    assert newest(folder) is best(folder) is None
    folder.mkdir()
    assert newest(folder) is best(folder) is None


def test_pruning_keeps_the_newest(folder: Path) -> None:
    save_steps(folder, 90, 100, 1100, 200, keep=2)
    assert steps(folder) == [100, 200, 1100]
    save_steps(folder, 1200, keep=2)
    assert steps(folder) == [1100, 1200]
    save_steps(folder, 1300, keep=1)
    assert steps(folder) == [1300]


def test_the_best_stays_however_old(folder: Path) -> None:
    save_steps(folder, 1, 2, 3, 4, 5, keep=2, scores={1: 0.5, 2: 0.25, 3: 0.5, 4: 0.75})
    assert steps(folder) == [2, 4, 5]
    assert best(folder) == folder / "step-00000002"
    save_steps(folder, 6, keep=2, scores={6: 0.125})
    assert steps(folder) == [5, 6]
    assert best(folder) == folder / "step-00000006"
    save_steps(folder, 7, keep=2, scores={7: 0.125})
    assert best(folder) == folder / "step-00000007"  # the newer of two


@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_a_score_that_is_not_finite_does_not_count(value: float, folder: Path) -> None:
    save_steps(folder, 1, 2, 3, keep=1, scores={1: 0.5, 2: value})
    assert steps(folder) == [1, 3]
    assert best(folder) == folder / "step-00000001"
    save_steps(folder, 4, keep=1, scores={4: value})
    assert read(folder / "step-00000004").score is None


def test_scores_of_another_name_are_not_compared(folder: Path) -> None:
    save_steps(folder, 1, scores={1: 0.1})
    save(folder, 2, values(2), {}, 10, Score("other", 0.2))
    assert best(folder) == folder / "step-00000002"


def test_a_damaged_best_gives_way_to_the_next(folder: Path) -> None:
    save_steps(folder, 1, 2, 3, scores={1: 0.2, 2: 0.1, 3: 0.3})
    flip_byte(folder / "step-00000002" / "training.safetensors")
    with pytest.warns(UserWarning, match=r"step-00000002: skipped, training\.safetensors has a wrong"):
        assert best(folder) == folder / "step-00000001"


def test_pruning_does_not_count_incomplete_ones(folder: Path) -> None:
    save_steps(folder, 1, 2)
    (folder / "step-00000002" / "state.json").unlink()
    save_steps(folder, 3, keep=2)
    assert steps(folder) == [1, 3]


def test_pruning_counts_a_step_once(folder: Path) -> None:
    save_steps(folder, 1, 2)
    shutil.copytree(folder / "step-00000002", folder / "step-00000002.previous")  # of a killed save
    save_steps(folder, 3, keep=3)
    assert steps(folder) == [1, 2, 3]


def test_remains_of_dead_runs_are_swept(folder: Path) -> None:
    (folder / ".tmp-5-1").mkdir(parents=True)
    (folder / ".tmp-5-1" / "training.safetensors").write_bytes(b"half")
    save_steps(folder, 6)
    assert steps(folder) == [6]


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.unlink()  # another name of the same file keeps its content
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [flip_byte, truncate, Path.unlink])
def test_damaged_checkpoint_is_passed_over(folder: Path, name: str, damage: Callable[[Path], None]) -> None:
    save_steps(folder, 1, 2, 3)
    damage(folder / "step-00000003" / name)
    with pytest.warns(UserWarning, match="step-00000003: skipped") as caught:
        found = newest(folder)
    assert len(caught) == 1
    assert found == folder / "step-00000002"
    # The run comes by that step again and repairs it.
    save_steps(folder, 3)
    repaired = newest_quietly(folder)
    assert repaired is not None
    assert repaired.step == 3
    assert load_file(folder.parent / "encoder.safetensors")["w"][0] == 3


@pytest.mark.parametrize("name", FILES)
def test_an_incomplete_one_is_not_read(name: str, folder: Path) -> None:
    save_steps(folder, 1)
    (folder / "step-00000001" / name).unlink()
    with pytest.raises(UserError, match=rf"^checkpoint .*/step-00000001: {name} cannot be read \(No such"):
        read(folder / "step-00000001")


def test_a_damaged_header_is_one_line(folder: Path) -> None:
    save_steps(folder, 1)
    path = folder / "step-00000001" / "training.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)  # of the right size
    with pytest.raises(UserError, match=r"^checkpoint .*/step-00000001: cannot be read \(.+\)$"):
        read(folder / "step-00000001")


def test_other_format_and_wrong_place_are_passed_over(folder: Path) -> None:
    save_steps(folder, 1)
    shutil.copytree(folder / "step-00000001", folder / "step-00000009")
    with pytest.warns(UserWarning, match="is of step 1"):
        found = newest(folder)
    assert found == folder / "step-00000001"
    (folder / "step-00000001" / "manifest.json").write_text('{"format": 1, "step": 1, "files": {}}')
    shutil.rmtree(folder / "step-00000009")
    with pytest.warns(UserWarning, match="format 1, this version reads 2"):
        assert newest(folder) is None


def test_a_checkpoint_can_be_loaded_at_every_line_of_a_save(folder: Path) -> None:
    save_steps(folder, 6, 7, keep=2)
    seen: list[tuple[int, str]] = []
    published: list[float] = []
    modules = [module.__file__ for module in (checkpoint, checkpoint_file, checkpoint_folder, shutil)]

    def look(frame: FrameType, event: str, argument: Any) -> Any:
        if frame.f_code.co_filename not in modules:
            return None
        assert all((path / "manifest.json").exists() for path in folder.glob("step-*"))
        found = newest_quietly(folder)
        seen.append((found.step, found.state.get("version", "old")) if found else (0, "none"))
        published.append(float(load_file(folder.parent / "encoder.safetensors")["w"][0]))
        return look

    tracing = sys.gettrace()
    sys.settrace(look)
    try:
        save(folder, 7, values(7), {"version": "new"}, 2, None)
        save(folder, 8, values(8), {"version": "new"}, 1, None)
    finally:
        sys.settrace(tracing)
    assert sorted(set(seen), key=seen.index) == [(7, "old"), (7, "new"), (8, "new")]
    assert seen == sorted(seen, key=lambda state: (state[0], state[1] == "new"))
    assert published == sorted(published)
    assert set(published) == {7, 8}
    assert steps(folder) == [8]


@pytest.mark.parametrize("name", FILES)
def test_failed_save_leaves_nothing_behind(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_steps(folder, 1)
    write_file = checkpoint.write_file

    def fail(path: Path, parts: Any) -> Any:
        if path.name == name:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "disk full")
        return write_file(path, parts)

    monkeypatch.setattr(checkpoint, "write_file", fail)
    with pytest.raises(OSError, match="disk full") as caught:
        save_steps(folder, 2)
    assert caught.value.filename == str(folder / "step-00000002")
    assert steps(folder) == [1]
    assert load_file(folder.parent / "encoder.safetensors")["w"][0] == 1
    monkeypatch.undo()
    save_steps(folder, 2)
    assert steps(folder) == [1, 2]


@pytest.mark.dist
def test_kills_at_random_moments_never_lose_a_checkpoint(tmp_path: Path) -> None:
    program = Path(__file__).with_name("interrupted_saves.py")
    done = subprocess.run([sys.executable, program, tmp_path], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def saved(folder: Path, **shapes: tuple[int, ...]) -> Checkpoint:
    tensors = {name: torch.zeros(shape) for name, shape in shapes.items()}
    return read(save(folder, 1, tensors, {}, 1, None))


def test_match_accepts_the_same_model(folder: Path) -> None:
    match(saved(folder, weight=(2, 3), scale=()), {"weight": (2, 3), "scale": ()})


@pytest.mark.parametrize(
    ("expected", "reason"),
    [
        ({"a": (1, 17, 96), "b": (2,)}, "a is [1, 65, 96] there, [1, 17, 96] here"),
        ({"a": (1, 65, 96), "b": (2,), "c": (1,)}, "c is missing there"),
        ({"a": (1, 65, 96)}, "b is there, not expected here"),
        ({"c": (1,)}, "c is missing there; a is there, not expected here; b is there, not expected here"),
    ],
)
def test_match_names_what_differs(expected: dict[str, tuple[int, ...]], reason: str, folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        match(saved(folder, a=(1, 65, 96), b=(2,)), expected)
    assert str(caught.value) == f"checkpoint {folder / 'step-00000001'}: is of another model ({reason})"
