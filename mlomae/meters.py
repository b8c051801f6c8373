"""Running means and finiteness checks that stay on the device, and how they come to the host unhurried."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mlomae.distributed import collectives
from mlomae.errors import UserError


class ToHost:
    """A tensor on its way to the host; the device goes on working meanwhile."""

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._host = tensor
        if tensor.is_cuda:
            self._host = torch.empty_like(tensor, device="cpu", pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def read(self) -> Tensor:
        """The tensor, in host memory; waits for it if need be."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._host


class Scalars:
    """0-dim tensors by name, averaged over ranks, on their way to the host."""

    def __init__(self, scalars: Mapping[str, Tensor]) -> None:
        self._names = sorted(scalars)
        stacked = torch.stack([scalars[name].to(torch.float64) for name in self._names])
        (mean,) = collectives.average([stacked])
        self._values = ToHost(mean)

    def read(self) -> dict[str, float]:
        """The means by name."""
        return dict(zip(self._names, self._values.read().tolist(), strict=True))


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

    def take(self) -> dict[str, Tensor]:
        """The means over iterations by name, on the device; starts again."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, tuple[float, int]]:
        """Sums, averaged over ranks, and counts by name; called on all ranks together."""
        sums = Scalars(self._sums).read() if self._sums else {}
        return {name: (total, self._counts[name]) for name, total in sums.items()}

    def load_state_dict(self, state: Mapping[str, tuple[float, int]], device: torch.device) -> None:
        """Goes on from there."""
        self._sums = {name: torch.tensor(total, device=device) for name, (total, _) in state.items()}
        self._counts = {name: count for name, (_, count) in state.items()}


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
        self.judge(self.snapshot())

    def snapshot(self) -> ToHost | None:
        """What was seen so far on all ranks, on its way to the host; None before anything was."""
        if not self._first_bad:
            return None
        return ToHost(-collectives.maximum(-torch.stack(list(self._first_bad.values()))))

    def judge(self, snapshot: ToHost | None) -> None:
        """``check`` of an earlier state."""
        if snapshot is None:
            return
        step, position = snapshot.read().min(dim=0)
        if int(step) < torch.iinfo(torch.int64).max:
            level = list(self._first_bad)[int(position)]
            raise UserError(
                f"{level} level: the loss or the weights are not finite at iteration {int(step)}; "
                f"checkpoints from before stay; try a lower {level}.lr or set {level}.clip"
            )
