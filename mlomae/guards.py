"""What watches over the numbers of a run: levels that are no longer finite, and losses that jump."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from mlomae.distributed import collectives
from mlomae.errors import NotFinite
from mlomae.meters import ToHost

_NEVER = torch.iinfo(torch.int64).max
# A peak is a jump where it lies so many deviations above what the last lines had, and so far in relation to
# it; before there are lines enough, nothing is.
PEAKS, FEWEST = 20, 8
DEVIATIONS, RELATIVE = 8.0, 0.3


@dataclass
class _Level:
    """On the device, int64: bad iterations in a row, where they began, and where the level failed."""

    streak: Tensor
    began: Tensor
    failed: Tensor
    skipped: Tensor | int = 0


class FiniteGuard:
    """Follows, on the device, whether the levels stay finite.

    An iteration of a level is bad if its loss is not finite or a step of it was skipped. A few in a row are
    passed over. A level fails after more of them, or with weights that are not finite.

    Args:
        allowed: bad iterations in a row that are passed over.
    """

    def __init__(self, allowed: int = 0) -> None:
        self._allowed = allowed
        self._levels: dict[str, _Level] = {}

    def watch(
        self, level: str, iteration: int, loss: Tensor, weight_norm: Tensor, skipped: Tensor | int
    ) -> None:
        """Notes one iteration of a level; no host synchronisation.

        Of levels that break in the same iteration, the one watched first is named: call it in the
        order in which they depend on each other.

        Args:
            loss, weight_norm: 0-dim.
            skipped: steps that the level's engine has skipped so far.
        """
        if level not in self._levels:
            zero = torch.zeros((), dtype=torch.int64, device=loss.device)
            self._levels[level] = _Level(zero, zero, zero + _NEVER)
        state = self._levels[level]
        if isinstance(skipped, int):  # filled in on the device: a copy from the host would wait
            skipped = torch.full((), skipped, device=loss.device)
        bad = ~torch.isfinite(loss) | (skipped > state.skipped)
        broken = ~torch.isfinite(weight_norm)
        state.skipped = skipped
        state.began = torch.where(bad & (state.streak > 0), state.began, iteration)
        state.streak = torch.where(bad, state.streak + 1, 0)
        failed = broken | (state.streak > self._allowed)
        state.failed = torch.minimum(state.failed, torch.where(failed, state.began, _NEVER))

    def check(self, at_end: bool = False) -> bool:
        """Stops every rank if a level has failed on any of them.

        Args:
            at_end: of the run, where nothing follows that could make a bad iteration good.

        Returns:
            Whether the last iteration of every level was good.

        Raises:
            NotFinite: naming the level and the iteration that went wrong first.
        """
        snapshot = self.snapshot()
        if snapshot is None:
            return True
        failed, bad_since = snapshot.read()
        self._refuse(torch.minimum(failed, bad_since) if at_end else failed)
        return bool((bad_since == _NEVER).all())

    def forget(self) -> None:
        """Begins anew, from weights that were good."""
        for state in self._levels.values():
            state.streak = torch.zeros_like(state.streak)
            state.failed = torch.full_like(state.failed, _NEVER)

    def snapshot(self) -> ToHost | None:
        """[2, levels]: where they failed, and since when they are bad, on any rank; None before any level."""
        if not self._levels:
            return None
        first = [
            torch.stack([state.failed, torch.where(state.streak > 0, state.began, _NEVER)])
            for state in self._levels.values()
        ]
        return ToHost(-collectives.maximum(-torch.stack(first, dim=1)))

    def judge(self, snapshot: ToHost | None) -> None:
        """Raises ``NotFinite`` if a level had failed at an earlier state."""
        if snapshot is not None:
            self._refuse(snapshot.read()[0])

    def _refuse(self, iterations: Tensor) -> None:
        """Raises ``NotFinite`` about the first of these, one for each level."""
        iteration, position = iterations.min(dim=0)
        if int(iteration) < _NEVER:
            level = list(self._levels)[int(position)]
            raise NotFinite(
                f"{level} level: the loss or the weights are not finite at iteration {int(iteration)}; "
                f"checkpoints from before stay; try a lower {level}.lr or set {level}.clip"
            )


class SpikeAlarm:
    """Tells which losses of a log line lie far above those of the lines before.

    The largest loss between two lines is compared with the median of the last ``PEAKS`` such values and their
    median deviation from it, which single jumps move little.

    Args:
        lines: those that were logged before, oldest first.
    """

    PREFIX = "peak_loss/"

    def __init__(self, lines: Iterable[Mapping[str, object]]) -> None:
        self._peaks: defaultdict[str, deque[float]] = defaultdict(lambda: deque(maxlen=PEAKS))
        for line in lines:
            for name, peak in line.items():
                if isinstance(peak, float):
                    self._take(name, peak)

    def jumps(self, scalars: Mapping[str, float]) -> dict[str, tuple[float, float]]:
        """Takes one line.

        Returns:
            Level → its peak, and the median of those before.
        """
        found = {}
        for name, peak in scalars.items():
            if not name.startswith(self.PREFIX):
                continue
            before = self._peaks[name]
            if len(before) >= FEWEST:
                middle = median(before)
                deviation = median(abs(value - middle) for value in before)
                if peak > middle + max(DEVIATIONS * deviation, RELATIVE * abs(middle)):
                    found[name.removeprefix(self.PREFIX)] = peak, middle
            self._take(name, peak)
        return found

    def _take(self, name: str, peak: float) -> None:
        """Infinities are no measure of what is usual either, and a log has null for both."""
        if name.startswith(self.PREFIX) and math.isfinite(peak):
            self._peaks[name].append(peak)
