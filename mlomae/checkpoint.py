"""Checkpoints: named full tensors and a little JSON, independent of world size and ZeRO stage.

    encoder.safetensors                             that of the newest checkpoint
    checkpoints/step-00000200/encoder.safetensors   the encoder's weights as a timm state dict
                              training.safetensors  all other tensors
                              state.json            counters, schedules
                              manifest.json         format, step, score; size and SHA-256 of the others

A checkpoint is prepared in a hidden folder, forced to the disk and put in place by one rename, so
that a process may be killed at any moment. There is no pickle: loading runs no code. One process
writes (``RunDir`` holds the lock), any number may read.
"""

from __future__ import annotations

import json
import math
import os
import threading
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from mlomae import checkpoint_folder
from mlomae.checkpoint_file import StoredTensors, safetensors_parts, write_file
from mlomae.checkpoint_folder import ENCODER, FORMAT, MANIFEST, STATE, TRAINING, Score
from mlomae.errors import UserError
from mlomae.run_dir import first_few, link_atomically, sync

# Before the timm names of the encoder's weights.
_ENCODER_PREFIX = "pretrain.weight.encoder."
# A save removes what dead ones left and must not take a live one for dead.
_one_at_a_time = threading.Lock()
_PATIENCE = 120.0  # seconds


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk.

    Attributes:
        path: its folder.
        step: outer iterations done when it was saved.
        tensors: by name, with the shapes and dtypes that were saved; on the CPU.
        state: everything else (counters, schedules).
        score: None if it was saved without a finite one.
    """

    path: Path
    step: int
    tensors: StoredTensors
    state: dict[str, Any]
    score: Score | None

    def part(self, level: str) -> StoredTensors:
        """The state of a level's engine."""
        return self.tensors.under(f"{level}.")


def save(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
    score: Score | None,
) -> Path:
    """Writes a checkpoint durably, puts its encoder beside ``folder`` and removes older checkpoints.

    The newest ``keep`` complete ones up to ``step`` stay, and the one with the best score. A checkpoint of
    the same step is replaced; until the new one is in place the old one is found by ``newest``.

    Args:
        folder: holds all checkpoints of a run; created if missing.
        tensors: any device and layout; nobody may change them meanwhile.
        state: must be serialisable as JSON.
        score: does not count if it is not finite.

    Returns:
        The folder of the checkpoint.

    Raises:
        OSError: with the name of that folder. Checkpoints from before are intact.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f".tmp-{step}-{os.getpid()}"
    prefix = _ENCODER_PREFIX
    encoder = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    training = {name: t for name, t in tensors.items() if not name.startswith(prefix)}
    contents = {
        ENCODER: safetensors_parts(encoder),
        TRAINING: safetensors_parts(training),
        STATE: [json.dumps(state).encode()],
    }
    with _one_at_a_time:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            sync(folder.parent)
            checkpoint_folder.sweep(folder)
            temporary.mkdir()
            files = {name: write_file(temporary / name, parts) for name, parts in contents.items()}
            counted = asdict(score) if score is not None and math.isfinite(score.value) else None
            manifest = {"format": FORMAT, "step": step, "score": counted, "files": files}
            write_file(temporary / MANIFEST, [json.dumps(manifest).encode()])
            sync(temporary)
            # Before the checkpoint: a run that is killed in between comes by this step again.
            link_atomically(temporary / ENCODER, folder.parent / ENCODER)
            checkpoint_folder.publish(temporary, final)
            checkpoint_folder.prune(folder, step, keep)
        except OSError as error:
            error.filename = str(final)  # the user does not know the hidden folder
            raise
        finally:
            checkpoint_folder.sweep(folder)
    return final


def newest(folder: Path) -> Path | None:
    """The newest checkpoint whose checksums hold; warns about each damaged one that it passes over."""
    return checkpoint_folder.first_intact(checkpoint_folder.newest_first(folder))


def usable(folder: Path) -> list[Path]:
    """The newest intact checkpoint, if there is one.

    Raises:
        UserError: none of those that are there can be used; to begin anew would remove them.
    """
    path = newest(folder)
    if path is None and any(folder.glob("step-*")):
        raise UserError(
            f"{folder}: none of the checkpoints can be used (see the warnings); put an intact one there, "
            "or choose another run_dir"
        )
    return [] if path is None else [path]


def best(folder: Path) -> Path | None:
    """The checkpoint with the lowest score whose checksums hold; warns about damaged ones on the way."""
    candidates = checkpoint_folder.newest_first(folder)
    return checkpoint_folder.first_intact(checkpoint_folder.best_first(candidates))


def read(path: Path) -> Checkpoint:
    """Opens a checkpoint that ``newest`` or ``best`` returned; its checksums are not computed again.

    Raises:
        UserError: it is incomplete.
    """
    problem = checkpoint_folder.problem_of(path, checksums=False)
    if problem is not None:
        raise UserError(f"checkpoint {path}: {problem}")
    try:
        state = json.loads((path / STATE).read_text())
        tensors = StoredTensors.open({path / ENCODER: _ENCODER_PREFIX, path / TRAINING: ""})
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"checkpoint {path}: cannot be read ({error})") from None
    step, score = checkpoint_folder.step_of(path), checkpoint_folder.score_of(path)
    return Checkpoint(path, step, tensors, state, score)


def match(checkpoint: Checkpoint, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Checks the names and shapes of all tensors; loads none.

    Raises:
        UserError: one line naming the tensors that differ, are missing or are not expected.
    """
    found = checkpoint.tensors.shapes()
    problems = [
        f"{name} is {list(found[name])} there, {list(shape)} here"
        for name, shape in expected.items()
        if name in found and found[name] != tuple(shape)
    ]
    problems += [f"{name} is missing there" for name in expected if name not in found]
    problems += [f"{name} is there, not expected here" for name in found if name not in expected]
    if problems:
        raise UserError(f"checkpoint {checkpoint.path}: is of another model ({first_few(problems)})")


class BackgroundWriter:
    """Writes checkpoints in a thread while training goes on, one at a time. Rank 0 uses it.

    The thread is a daemon: a process that ends without ``finish`` or ``close`` does not wait for it, and what
    it was writing is lost as if the process had been killed.

    Args:
        folder, keep: as for ``save``.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep
        self._thread: threading.Thread | None = None
        self._failure: BaseException | None = None

    def submit(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], score: Score | None
    ) -> None:
        """Begins to write a checkpoint; waits only if the one before it is still being written.

        Args:
            tensors: in host memory; nobody changes them, or ``state``, from now on.

        Raises:
            OSError: the one before could not be written; this one is not begun.
        """
        self.finish()
        arguments = (step, tensors, state, score)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Waits until what was submitted is in place.

        Raises:
            OSError: it could not be written; checkpoints from before are intact.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def linger(self, seconds: float) -> None:
        """Gives a write in progress some time, before the process is ended from another thread."""
        thread = self._thread
        if thread is not None:
            thread.join(seconds)

    def close(self) -> None:
        """``finish`` on the way out of a run that failed.

        A write that fails, or takes longer than two minutes, is a warning here: the other failure counts.
        """
        if self._thread is None:
            return
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            warnings.warn(f"the last checkpoint is not written after {_PATIENCE:.0f} s", stacklevel=2)
        elif self._failure is not None:
            warnings.warn(f"the last checkpoint could not be written ({self._failure})", stacklevel=2)
        self._thread = self._failure = None

    def _write(
        self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], score: Score | None
    ) -> None:
        try:
            save(self._folder, step, tensors, state, self._keep, score)
        except BaseException as failure:  # raised again where the run waits for it
            self._failure = failure
