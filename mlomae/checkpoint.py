"""Checkpoints: named full tensors and a little JSON, independent of world size and ZeRO stage.

    step-00000200/tensors.safetensors
                  state.json
                  manifest.json          format, step, size and SHA-256 of the two others; written last

A checkpoint is prepared in a hidden folder, forced to the disk and put in place by one rename, so
that a process may be killed at any moment. There is no pickle: loading runs no code. One process
writes at a time (``RunDir`` holds the lock); any number may read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from mlomae.errors import UserError
from mlomae.run_dir import first_few, sync

FORMAT = 1
TENSORS, STATE, MANIFEST = "tensors.safetensors", "state.json", "manifest.json"
_NAME = re.compile(r"step-(\d+)(\.previous)?")


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint, tensors on the CPU.

    Attributes:
        path: its folder.
        step: outer iterations done when it was saved.
        tensors: by name, with the shapes and dtypes that were saved.
        state: everything else (counters, schedules).
    """

    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save(folder: Path, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], keep: int) -> Path:
    """Writes a checkpoint durably, then removes all but the newest ``keep`` complete ones up to ``step``.

    A checkpoint of the same step is replaced; until the new one is in place the old one is found by
    ``latest``.

    Args:
        folder: holds all checkpoints of a run; created if missing.
        tensors: any device, layout and dtype; those that overlap others in memory are stored in full.
        state: must be serialisable as JSON.

    Returns:
        The folder of the checkpoint.
    """
    state_text = json.dumps(state)
    folder.mkdir(parents=True, exist_ok=True)
    sync(folder.parent)
    _sweep(folder)
    temporary = folder / f".tmp-{step}-{os.getpid()}"
    final = folder / f"step-{step:08d}"
    try:
        temporary.mkdir()
        save_file(_separate(tensors), temporary / TENSORS)
        (temporary / STATE).write_text(state_text)
        files = {name: _describe(temporary / name) for name in (TENSORS, STATE)}
        (temporary / MANIFEST).write_text(json.dumps({"format": FORMAT, "step": step, "files": files}))
        for path in (*temporary.iterdir(), temporary):
            sync(path)
        _publish(temporary, final)
        _prune(folder, step, keep)
    finally:
        _sweep(folder)
    return final


def latest(folder: Path) -> Checkpoint | None:
    """Loads the newest checkpoint whose checksums hold; warns about each damaged one it passes over."""
    for path in _newest_first(folder):
        problem = _problem(path, checksums=True)
        if problem is None:
            state = json.loads((path / STATE).read_text())
            return Checkpoint(path, _step(path), load_file(path / TENSORS), state)
        warnings.warn(f"checkpoint {path}: skipped, {problem}", stacklevel=2)
    return None


def match(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Checks the names and shapes of all tensors.

    Raises:
        UserError: one line naming the tensors that differ, are missing or are not expected.
    """
    found = {name: tuple(tensor.shape) for name, tensor in checkpoint.tensors.items()}
    problems = [
        f"{name} is {list(found[name])} there, {list(shape)} here"
        for name, shape in expected.items()
        if name in found and found[name] != tuple(shape)
    ]
    problems += [f"{name} is missing there" for name in expected if name not in found]
    problems += [f"{name} is there, not expected here" for name in found if name not in expected]
    if problems:
        raise UserError(f"checkpoint {checkpoint.path}: is of another model ({first_few(problems)})")


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors without common memory, as the file format needs; copies only where it must."""
    separate = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    ends: dict[Any, int] = {}
    for name, tensor in sorted(separate.items(), key=lambda item: item[1].data_ptr()):
        start = tensor.data_ptr()
        if start < ends.get(tensor.device, 0):
            separate[name] = tensor.clone()
        else:
            ends[tensor.device] = start + tensor.nbytes
    return separate


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _problem(path: Path, checksums: bool) -> str | None:
    """Why a checkpoint cannot be used, or None. Without ``checksums`` only sizes are compared."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT}"
        if manifest["step"] != _step(path):
            return f"{MANIFEST} is of step {manifest['step']}"
        for name in (TENSORS, STATE):
            entry = manifest["files"][name]
            size = (path / name).stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} bytes, should have {entry['size']}"
            if checksums and _sha256(path / name) != entry["sha256"]:
                return f"{name} has a wrong checksum"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    return None


def _publish(temporary: Path, final: Path) -> None:
    """Puts a finished checkpoint in place.

    A folder cannot replace a non-empty one in a single step. Between the two renames the earlier
    checkpoint of the same step goes by the name ``….previous``, which readers accept.
    """
    previous = final.with_name(f"{final.name}.previous")
    if final.exists():
        _discard(previous)
        os.replace(final, previous)
    os.replace(temporary, final)
    sync(final.parent)
    _discard(previous)


def _prune(folder: Path, step: int, keep: int) -> None:
    # Later steps can only be damaged ones that the run fell back from: it will replace them.
    older = [path for path in _newest_first(folder) if _step(path) < step]
    complete = [path for path in older if _problem(path, checksums=False) is None]
    for path in older:
        if path not in complete[: keep - 1]:
            _discard(path)


def _discard(path: Path) -> None:
    """Removes a checkpoint; hidden first, so that no half-removed one is ever seen."""
    if path.exists():
        hidden = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        os.replace(path, hidden)
        shutil.rmtree(hidden)


def _sweep(folder: Path) -> None:
    """Removes what killed or failed saves left; the run's lock guarantees that no other is at work."""
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path)


def _newest_first(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (-_step(path), path.name))


def _step(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])
