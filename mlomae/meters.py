"""Running means and maxima that stay on the device, and how they come to the host unhurried."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mlomae.distributed import collectives


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
            value = value.detach()
            self._sums[name] = self._join(self._sums[name], value) if name in self._sums else value.clone()
            self._counts[name] = self._counts.get(name, 0) + 1

    def _join(self, before: Tensor, value: Tensor) -> Tensor:
        return before + value

    def _of_all_ranks(self) -> dict[str, Tensor]:
        return self._sums  # averaged by ``Scalars``

    def take(self) -> dict[str, Tensor]:
        """The means over iterations by name, on the device; starts again."""
        means = {name: total / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means

    def state_dict(self) -> dict[str, tuple[float, int]]:
        """Sums, averaged over ranks, and counts by name; called on all ranks together."""
        sums = Scalars(self._of_all_ranks()).read() if self._sums else {}
        return {name: (total, self._counts[name]) for name, total in sums.items()}

    def load_state_dict(self, state: Mapping[str, tuple[float, int]], device: torch.device) -> None:
        """Goes on from there."""
        self._sums = {name: torch.tensor(total, device=device) for name, (total, _) in state.items()}
        self._counts = {name: count for name, (_, count) in state.items()}


class Peaks(Meters):
    """The largest of the scalars since the last read, on any rank; NaN counts as infinite."""

    def _join(self, before: Tensor, value: Tensor) -> Tensor:
        return torch.maximum(before, value)

    def _of_all_ranks(self) -> dict[str, Tensor]:
        if not self._sums:
            return {}
        own = torch.stack([peak.to(torch.float64) for peak in self._sums.values()])
        peaks = collectives.maximum(own.nan_to_num(nan=torch.inf, posinf=torch.inf))
        return dict(zip(self._sums, peaks, strict=True))

    def take(self) -> dict[str, Tensor]:
        """The maxima by name, on the device; starts again. Called on all ranks together."""
        peaks, self._sums, self._counts = self._of_all_ranks(), {}, {}
        return peaks
