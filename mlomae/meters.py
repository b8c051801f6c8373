"""Running means and finiteness checks that stay on the device between log lines."""

from __future__ import annotations

import torch
from torch import Tensor

from mlomae.distributed import collectives
from mlomae.errors import UserError


class Meters:
    """Averages scalars over the iterations, since the last read, that had them."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Adds one iteration's 0-dim tensors; no host synchronisation."""
        for name, value in scalars.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.detach().clone()
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """The means over iterations and ranks, by name; resets. One host read."""
        names = sorted(self._sums)
        stacked = torch.stack([self._sums[name].to(torch.float64) / self._counts[name] for name in names])
        (mean,) = collectives.average([stacked])
        self._sums, self._counts = {}, {}
        return dict(zip(names, mean.tolist(), strict=True))


class FiniteGuard:
    """Remembers, on the device, the first iteration at which a level was not finite."""

    def __init__(self) -> None:
        self._first_bad: dict[str, Tensor] = {}

    def watch(self, level: str, iteration: int, *values: Tensor) -> None:
        """Notes whether all ``values`` (0-dim) are finite; no host synchronisation.

        Of levels that break in the same iteration, the one watched first is named: call it in the
        order in which they depend on each other.
        """
        finite = torch.stack([torch.isfinite(value) for value in values]).all()
        never = torch.full((), torch.iinfo(torch.int64).max, dtype=torch.int64, device=finite.device)
        seen = torch.where(finite, never, torch.full_like(never, iteration))
        self._first_bad[level] = torch.minimum(self._first_bad.get(level, never), seen)

    def check(self) -> None:
        """Stops every rank if any rank saw a value that is not finite.

        Raises:
            UserError: naming the level and the iteration that went wrong first.
        """
        levels = list(self._first_bad)
        if not levels:
            return
        first = -collectives.maximum(-torch.stack([self._first_bad[level] for level in levels]))
        step, position = first.min(dim=0)
        if int(step) < torch.iinfo(torch.int64).max:
            level = levels[int(position)]
            raise UserError(
                f"{level} level: the loss or the weights are not finite at iteration {int(step)}; "
                f"checkpoints from before stay; try a lower {level}.lr or set {level}.clip"
            )
