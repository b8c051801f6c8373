"""What a run says about itself while it works: a line per interval, written once its numbers have arrived."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from mlomae.guards import FiniteGuard, SpikeAlarm
from mlomae.meters import Scalars, ToHost
from mlomae.metrics import MetricsWriter
from mlomae.progress import Show, say
from mlomae.sections import Display

SHOWN: Show = {
    "loss": {
        "loss/pretrain": "pretrain {:.4f}".format,
        "loss/label": "label {:.3f}".format,
        "loss/hardness": "hardness {:.3f}".format,
        "loss/head": "head {:.3f}".format,
        "loss/mask": "mask {:.3f}".format,
    },
    "gradient": {
        "hypergradient/norm": "hypergradient {:.1e}".format,
        "hypergradient/estimated_error": "error {:.2%}".format,
    },
    "mask": {
        "mask/entropy": "entropy {:.3f}".format,
        "mask/saturation": "saturation {:.1%}".format,
        "mask/agreement": "agreement {:.3f}".format,
    },
    "machine": {
        "images_per_second": "{:,.0f} img/s".format,
        "mfu": "mfu {:.0%}".format,
        "memory/peak_bytes": lambda value: f"{value / 2**30:.1f} GiB",
    },
}
"""Of a run's log lines what is on the screen."""


@dataclass(frozen=True)
class _Entry:
    step: int
    scalars: Scalars
    frequency: ToHost
    figures: dict[str, float]
    guard: ToHost | None


class Logbook:
    """Log lines on their way from the device to the writer: a line waits until the next one, or ``flush``.

    Args:
        writer: of the lines.
        guard: judged with every line, as it was when the line was begun.
        alarm: asked about every line.
        display: of the run.
    """

    def __init__(
        self, writer: MetricsWriter, guard: FiniteGuard, alarm: SpikeAlarm, display: Display
    ) -> None:
        self._writer = writer
        self._guard = guard
        self._alarm = alarm
        self._display = display
        self._entry: _Entry | None = None

    def begin(
        self, step: int, scalars: Mapping[str, Tensor], frequency: Tensor, figures: Mapping[str, float]
    ) -> None:
        """Sends one line's numbers to the host; called on all ranks together, without waiting.

        Args:
            scalars: 0-dim, on the device; averaged over ranks.
            frequency: [L], the same on all ranks.
            figures: known on the host.
        """
        self.flush()
        self._entry = _Entry(step, Scalars(scalars), ToHost(frequency), dict(figures), self._guard.snapshot())

    def flush(self) -> None:
        """Writes the line that waits, if there is one.

        Raises:
            UserError: a level was not finite when it was begun.
        """
        if self._entry is not None:
            guard = self._entry.guard
            self.write_waiting()
            self._guard.judge(guard)

    def write_waiting(self) -> None:
        """Writes it unjudged, such as when the run ends early; no other rank is needed."""
        entry, self._entry = self._entry, None
        if entry is None or not self._writer.enabled:
            return
        scalars = entry.scalars.read()
        jumps = self._alarm.jumps(scalars)
        for level, (peak, usual) in jumps.items():
            jump = f"its loss jumped from {usual:.4g} to {peak:.4g} by iteration {entry.step}"
            say(self._display, f"{level} level: {jump}")
        self._writer.log(
            entry.step,
            {**scalars, **entry.figures, "loss_jumps": len(jumps)},
            {"mask/frequency": entry.frequency.read().tolist()},
        )
