"""The levels' part of a checkpoint: what it holds of their engines, and the way back."""

from __future__ import annotations

from torch import Tensor

from mlomae import checkpoint
from mlomae.build import Levels
from mlomae.checkpoint import Checkpoint
from mlomae.distributed.engine import MOMENTS


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
