"""The levels' part of a checkpoint: what it holds of their engines, and the way back."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from mlomae import checkpoint
from mlomae.build import Levels
from mlomae.checkpoint import Checkpoint
from mlomae.distributed.engine import MOMENTS
from mlomae.errors import UserError


def snapshot(levels: Levels) -> dict[str, Tensor]:
    """All tensors, in host memory, as ``LEVEL.NAME``; called on every rank, {} on all but rank 0."""
    return {
        f"{name}.{key}": tensor
        for name, level in levels.by_name().items()
        for key, tensor in level.engine.snapshot().items()
    }


def restore(levels: Levels, loaded: Checkpoint) -> None:
    """Puts weights and moments back.

    Raises:
        UserError: it is of another model.
    """
    parts = {name: loaded.part(name) for name in levels.by_name()}
    # A level whose first step was skipped has no moments yet.
    stepped = {name for name, part in parts.items() if part["step"]}
    expected = {
        f"{name}.{key}": shape
        for name, level in levels.by_name().items()
        for key, shape in level.engine.shapes().items()
        if name in stepped or not key.startswith(MOMENTS)
    }
    checkpoint.match(loaded, expected)
    for name, level in levels.by_name().items():
        level.engine.load_state_dict(parts[name])


def usable_checkpoint(folder: Path) -> list[Path]:
    """The newest intact checkpoint, if there is one.

    Raises:
        UserError: none of those that are there can be used; to begin anew would remove them.
    """
    path = checkpoint.newest(folder)
    if path is None and any(folder.glob("step-*")):
        raise UserError(
            f"{folder}: none of the checkpoints can be used (see the warnings); put an intact one there, "
            "or choose another run_dir"
        )
    return [] if path is None else [path]
