"""Where the numbers of a run go: metrics.jsonl, TensorBoard and the screen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from mlomae.errors import UserError
from mlomae.progress import Progress, Show
from mlomae.run_dir import RunDir, to_json, write_atomically
from mlomae.sections import Display


class MetricsWriter:
    """Writes metrics on the rank where ``enabled`` is set; does nothing on the others.

    What an earlier process wrote about steps after ``first_step`` is dropped, since they run again.

    Args:
        total: steps of the run.
        first_step: steps done before (0, or the step of the checkpoint that was loaded).
        show, display: see ``Progress``.

    Raises:
        UserError: the tensorboard package is missing.
    """

    def __init__(
        self,
        run_dir: RunDir,
        enabled: bool,
        total: int,
        first_step: int,
        show: Show,
        display: Display = "auto",
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError("tensorboard: the package is missing; install it with pip") from None
        drop_lines_after(run_dir.metrics, first_step)
        self._file = open(run_dir.metrics, "a")  # noqa: SIM115 - open for the whole run
        self._tensorboard = SummaryWriter(str(run_dir.tensorboard), purge_step=first_step + 1)
        self._progress = Progress(total, first_step, show, display)

    def log(
        self, step: int, scalars: Mapping[str, float], arrays: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        """Records one step. ``arrays`` go to metrics.jsonl only; non-finite numbers become null there."""
        if not self.enabled:
            return
        self._file.write(to_json({"step": step, **scalars, **(arrays or {})}) + "\n")
        self._file.flush()
        for name, value in scalars.items():
            self._tensorboard.add_scalar(name, value, step)
        # A killed run is continued from a checkpoint: events up to it must have reached the file.
        self._tensorboard.flush()
        self._progress.log(step, scalars)

    def image(self, step: int, path: Path) -> None:
        """Adds a PNG file to TensorBoard."""
        if self.enabled:
            with Image.open(path) as picture:
                pixels = np.asarray(picture.convert("RGB"))
            self._tensorboard.add_image(path.stem, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Ends the display and closes the files."""
        if self.enabled:
            self._progress.close()
            self._tensorboard.close()
            self._file.close()


def drop_lines_after(path: Path, step: int) -> None:
    """Keeps the whole lines of steps up to ``step``: a killed process may leave a partial last one."""
    if not path.exists():
        return
    lines = path.read_text().splitlines()
    kept = [line for line in lines if _step_of(line) <= step]
    write_atomically(path, "".join(f"{line}\n" for line in kept).encode())


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
