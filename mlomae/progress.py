"""What a run shows while it works: a bar on a terminal, one plain line per log interval elsewhere."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress
from rich.table import Column


class Progress:
    """Shows the step, chosen scalars and the remaining time on standard output.

    Args:
        total: steps of the run.
        first_step: steps done before this process started.
        show: scalar name → how to show it, in order: ``{"loss/pretrain": "pretrain {:.4f}"}``.
    """

    def __init__(self, total: int, first_step: int, show: Mapping[str, str]) -> None:
        self._total = total
        self._show = show
        # A window, so that slow first steps (compilation, cold caches) leave the estimate soon.
        self._times = deque([(first_step, time.monotonic())], maxlen=20)
        console = Console(highlight=False)
        self._bar: RichProgress | None = None
        if sys.stdout.isatty() and not console.is_dumb_terminal:
            step_width = len(f"step {total}/{total}")  # kept in a narrow window, where the text is cut
            self._bar = RichProgress(
                TextColumn(
                    "step {task.completed}/{task.total}",
                    table_column=Column(min_width=step_width, no_wrap=True),
                ),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[text]}", markup=False),
                console=console,
            )
            self._task = self._bar.add_task("", total=total, completed=first_step, text="")
            self._bar.start()

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Shows ``step`` of ``total``; scalars that were not logged this time are left out."""
        self._times.append((step, time.monotonic()))
        shown = [form.format(scalars[name]) for name, form in self._show.items() if name in scalars]
        text = "  ".join([*shown, f"eta {self._eta()}"])
        if self._bar is None:
            print(f"step {step}/{self._total}  {text}", flush=True)
        else:
            self._bar.update(self._task, completed=step, text=text)

    def close(self) -> None:
        """Leaves the bar as it is and gives the terminal back."""
        if self._bar is not None:
            self._bar.stop()

    def _eta(self) -> str:
        (first, start), (last, now) = self._times[0], self._times[-1]
        if last <= first:
            return "?"
        minutes, seconds = divmod(round((self._total - last) * (now - start) / (last - first)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
