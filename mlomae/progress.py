"""What a run shows while it works: a live view on a terminal, elsewhere a plain or JSON line per interval."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Mapping

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mlomae.run_dir import to_json
from mlomae.sections import Display

Show = Mapping[str, Mapping[str, Callable[[float], str]]]
"""Title of a row → scalar → its text: ``{"loss": {"loss/pretrain": "pretrain {:.4f}".format}}``."""


def say(display: Display, text: str) -> None:
    """A line about what is being done; only where people read along."""
    if display == "auto":
        print(text, flush=True)


class Progress:
    """Shows the step, chosen scalars and the remaining time on standard output.

    Args:
        total: steps of the run.
        first_step: steps done before this process started.
        show: what is shown, in order; rows of the view, one after the other in a plain line.
        display: auto: a view on a terminal, else plain lines; quiet: nothing; json: all scalars of a line
            as an object.
    """

    def __init__(self, total: int, first_step: int, show: Show, display: Display = "auto") -> None:
        self._total = total
        self._show = show
        self._display = display
        # A window, so that slow first steps (compilation, cold caches) leave the estimate soon.
        self._times = deque([(first_step, time.monotonic())], maxlen=20)
        console = Console(highlight=False)
        self._latest: dict[str, float] = {}  # some scalars come with few lines only
        self._live: Live | None = None
        if display == "auto" and sys.stdout.isatty() and not console.is_dumb_terminal:
            self._live = Live(self._view(first_step, {}), console=console, auto_refresh=False)
            self._live.start()

    def log(self, step: int, scalars: Mapping[str, float]) -> None:
        """Shows ``step`` of ``total``. The view keeps scalars that are not logged this time, lines do not."""
        self._times.append((step, time.monotonic()))
        if self._live is not None:
            self._latest |= scalars
            self._live.update(self._view(step, self._latest), refresh=True)
        elif self._display == "json":
            print(to_json({"step": step, "total": self._total, **scalars}), flush=True)
        elif self._display == "auto":
            shown = [text for row in self._show.values() for text in _texts(row, scalars)]
            print(f"step {step}/{self._total}  {'  '.join([*shown, f'eta {self._eta()}'])}", flush=True)

    def close(self) -> None:
        """Leaves the view as it is and gives the terminal back."""
        if self._live is not None:
            self._live.stop()

    def _view(self, step: int, scalars: Mapping[str, float]) -> Group:
        head = Table.grid(padding=(0, 2), expand=True)
        head.add_column(no_wrap=True)
        head.add_column(ratio=1)
        head.add_column(no_wrap=True)
        bar = ProgressBar(total=self._total, completed=step)
        head.add_row(f"step {step}/{self._total}", bar, f"eta {self._eta()}")
        rows = Table.grid(padding=(0, 2))
        rows.add_column(style="dim", no_wrap=True)
        rows.add_column()
        for title, row in self._show.items():
            texts = _texts(row, scalars)
            if texts:
                rows.add_row(title, Text("   ".join(texts)))
        return Group(head, rows)

    def _eta(self) -> str:
        (first, start), (last, now) = self._times[0], self._times[-1]
        if last <= first:
            return "?"
        minutes, seconds = divmod(round((self._total - last) * (now - start) / (last - first)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _texts(row: Mapping[str, Callable[[float], str]], scalars: Mapping[str, float]) -> list[str]:
    return [text(scalars[name]) for name, text in row.items() if name in scalars]
