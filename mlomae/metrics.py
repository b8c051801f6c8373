"""Where the numbers of a run go: metrics.jsonl, the loggers and the screen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol

from mlomae.loggers import open_loggers
from mlomae.progress import Progress, Show
from mlomae.run_dir import RunDir, to_json, write_atomically
from mlomae.sections import Display, LoggerName


class Watched(Protocol):
    """What a configuration says about being watched."""

    @property
    def display(self) -> Display: ...

    @property
    def loggers(self) -> tuple[LoggerName, ...]: ...

    def model_dump(self, *, mode: str) -> dict[str, Any]: ...


class MetricsWriter:
    """Writes metrics on the rank where ``enabled`` is set; does nothing on the others.

    What an earlier process wrote about steps after ``first_step`` is dropped, since they run again.

    Args:
        config: of the run.
        total: steps of the run.
        first_step: steps done before (0, or the step of the checkpoint that was loaded).
        show: see ``Progress``.

    Raises:
        UserError: a logger cannot be opened.
    """

    def __init__(
        self, run_dir: RunDir, config: Watched, enabled: bool, total: int, first_step: int, show: Show
    ) -> None:
        self.enabled = enabled
        if not enabled:
            return
        self._step, self._total = first_step, total
        self._loggers = open_loggers(config.loggers, run_dir.path, config.model_dump(mode="json"), first_step)
        drop_lines_after(run_dir.metrics, first_step)
        self._file = open(run_dir.metrics, "a")  # noqa: SIM115 - open for the whole run
        self._progress = Progress(total, first_step, show, config.display)

    def log(
        self, step: int, scalars: Mapping[str, float], arrays: Mapping[str, Sequence[float]] | None = None
    ) -> None:
        """Records one step. ``arrays`` go to metrics.jsonl only; non-finite numbers become null there."""
        if not self.enabled:
            return
        self._step = step
        self._file.write(to_json({"step": step, **scalars, **(arrays or {})}) + "\n")
        self._file.flush()
        for logger in self._loggers:
            logger.scalars(step, scalars)
        self._progress.log(step, scalars)

    def image(self, step: int, path: Path) -> None:
        """Hands a PNG file to the loggers, under its name without the ending."""
        if self.enabled:
            png = path.read_bytes()
            for logger in self._loggers:
                logger.image(step, path.stem, png)

    def result(self, figures: Mapping[str, Any]) -> None:
        """Hands the numbers among a run's final figures to the loggers, as ``result/NAME``."""
        if self.enabled:
            numbers = {
                f"result/{name}": float(value)
                for name, value in figures.items()
                if isinstance(value, int | float) and not isinstance(value, bool)
            }
            for logger in self._loggers:
                logger.scalars(self._step, numbers)

    def close(self) -> None:
        """Ends the display, closes the files and ends the loggers' runs."""
        if self.enabled:
            # All of them, even if a full disk refuses one.
            with ExitStack() as at_end:
                at_end.callback(self._file.close)
                for logger in self._loggers:
                    at_end.callback(logger.close, finished=self._step >= self._total)
                self._progress.close()


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
