"""The folder of a run's checkpoints: which are there, which are whole, how one gets in and out."""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mlomae.checkpoint_file import sha256
from mlomae.run_dir import sync

FORMAT = 2
ENCODER, TRAINING, STATE = "encoder.safetensors", "training.safetensors", "state.json"
MANIFEST = "manifest.json"
_NAME = re.compile(r"step-(\d+)(\.previous)?")


@dataclass(frozen=True)
class Score:
    """How good a checkpoint is.

    Attributes:
        name: of the measure; only scores of the same name are compared.
        value: lower is better.
    """

    name: str
    value: float


def first_intact(paths: Iterable[Path]) -> Path | None:
    """The first whose checksums hold; warns about each damaged one before it."""
    for path in paths:
        problem = problem_of(path, checksums=True)
        if problem is None:
            return path
        warnings.warn(f"checkpoint {path}: skipped, {problem}", stacklevel=3)
    return None


def problem_of(path: Path, checksums: bool) -> str | None:
    """Why a checkpoint cannot be used, or None. Without ``checksums`` only sizes are compared."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        if manifest["format"] != FORMAT:
            return f"{MANIFEST} has format {manifest['format']}, this version reads {FORMAT}"
        if manifest["step"] != step_of(path):
            return f"{MANIFEST} is of step {manifest['step']}"
        for name in (ENCODER, TRAINING, STATE):
            entry = manifest["files"][name]
            size = (path / name).stat().st_size
            if size != entry["size"]:
                return f"{name} has {size} bytes, should have {entry['size']}"
            if checksums and sha256(path / name) != entry["sha256"]:
                return f"{name} has a wrong checksum"
    except OSError as error:
        return f"{Path(error.filename or path).name} cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError):
        return f"{MANIFEST} is damaged"
    return None


def score_of(path: Path) -> Score | None:
    """The score in a manifest; None where there is none or the manifest is damaged."""
    try:
        return Score(**json.loads((path / MANIFEST).read_text())["score"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def best_first(paths: Iterable[Path]) -> list[Path]:
    """Those with a score of the newest score's name, lowest first.

    Args:
        paths: newest first, and so are those of equal score.
    """
    scores = {path: score for path in paths if (score := score_of(path)) is not None}
    name = next((score.name for score in scores.values()), None)
    return sorted((path for path, s in scores.items() if s.name == name), key=lambda path: scores[path].value)


def publish(temporary: Path, final: Path) -> None:
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


def prune(folder: Path, step: int, keep: int) -> None:
    """Removes all up to ``step`` but the newest ``keep`` complete ones and the best complete one."""
    # Later steps can only be damaged ones that the run fell back from: it will replace them.
    candidates = [path for path in newest_first(folder) if step_of(path) <= step]
    complete: dict[int, Path] = {}
    for path in candidates:
        if problem_of(path, checksums=False) is None:
            complete.setdefault(step_of(path), path)
    kept = [*list(complete.values())[:keep], *best_first(complete.values())[:1]]
    for path in candidates:
        if path not in kept:
            _discard(path)


def _discard(path: Path) -> None:
    """Removes a checkpoint; hidden first, so that no half-removed one is ever seen."""
    if path.exists():
        hidden = path.with_name(f".tmp-{path.name}-{os.getpid()}")
        os.replace(path, hidden)
        # A network disk keeps files that somebody still reads; `sweep` removes them later.
        shutil.rmtree(hidden, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Removes what killed or failed saves left; the run's lock guarantees that no other is at work.

    Remains that cannot be removed do no harm, and an error here would hide the one that a save failed with.
    """
    for path in folder.glob(".tmp-*"):
        shutil.rmtree(path, ignore_errors=True)


def newest_first(folder: Path) -> list[Path]:
    """All checkpoints, complete or not."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    return sorted(found, key=lambda path: (-step_of(path), path.name))


def step_of(path: Path) -> int:
    """The step in the name of a checkpoint."""
    found = _NAME.fullmatch(path.name)
    assert found is not None
    return int(found[1])
