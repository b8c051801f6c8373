"""The time of an outer iteration by part, kind of operation and operator, beside the FLOPs of its parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from mlomae.config import Config
from mlomae.flops import iteration_flops, pretrain_pass
from mlomae.profile_trace import BETWEEN, KINDS, PARTS, Piece, Reading

IDLE = "device idle"


@dataclass(frozen=True)
class PartTime:
    """A part of the outer iteration.

    Attributes:
        part: its name.
        host_seconds: per outer iteration, on the host; None for the idle device.
        device_seconds: the same of the kernels that it launched; None on a CPU.
        share: of the whole: on a GPU of the device's time, on a CPU of the host's.
        flops: model FLOPs per outer iteration; None where ``mlomae.flops`` counts none.
    """

    part: str
    host_seconds: float | None
    device_seconds: float | None
    share: float
    flops: float | None

    @property
    def flops_per_second(self) -> float | None:
        """Of the device's time where there is one, else of the host's."""
        seconds = self.host_seconds if self.device_seconds is None else self.device_seconds
        return self.flops / seconds if self.flops and seconds else None


@dataclass(frozen=True)
class KindTime:
    """A kind of operation: on a GPU the device's time, on a CPU the host's.

    Attributes:
        kind: its name.
        seconds: per outer iteration.
        share: of the whole.
    """

    kind: str
    seconds: float
    share: float


@dataclass(frozen=True)
class OperatorTime:
    """An operator of the host, or a kernel: its own time, without what is nested inside.

    Attributes:
        operator, kind: see ``mlomae.profile_trace.KINDS``.
        calls, seconds: per outer iteration.
        share: of the whole.
    """

    operator: str
    kind: str
    calls: float
    seconds: float
    share: float


def part_flops(config: Config, num_classes: int, estimator: str | None, due: float) -> dict[str, float]:
    """Model FLOPs of an average outer iteration by part, as ``PARTS`` names them.

    Args:
        due: share of the iterations that take a hypergradient.
    """

    def average(every: int) -> dict[str, float]:
        section = config.hypergradient.model_copy(update={"every": every})
        return iteration_flops(config.model_copy(update={"hypergradient": section}), num_classes, estimator)

    # Linear in the share of due iterations: two of them give all.
    always, half = average(1), average(2)
    never = {name: 2 * half[name] - always[name] for name in always}
    mean = {name: never[name] + due * (always[name] - never[name]) for name in always}
    images = config.pretrain.unroll_steps * config.pretrain.batch_size
    forward = float(images * pretrain_pass(config, num_classes).forward)
    parts = {"pretrain forward": forward, "pretrain backward": mean["pretrain"] - forward}
    if not config.masking.scored:
        return parts
    parts = {"mask selection": mean["masking"], **parts, "mask step": mean["mask"]}
    if not config.masking.learns:
        return parts
    return {
        **parts,
        # The head answers in the direction; its own step is what it costs in every iteration.
        "direction": mean["direction"] + mean["head"] - never["head"],
        "influence": mean["influence"],
        "head step": mean["features"] + never["head"],
    }


def part_times(reading: Reading, flops: Mapping[str, float], on_gpu: bool) -> list[PartTime]:
    """The parts that occurred, in the order of ``PARTS``, which add up to the whole.

    Args:
        flops: per outer iteration, by part.
    """
    host, device = (_seconds(pieces, reading, "part") for pieces in (reading.host, reading.device))
    whole = _whole(reading, on_gpu)
    parts = [part for part in dict.fromkeys(PARTS.values()) if part in host]
    rows = []
    for part in parts:
        own = device.get(part, 0.0) if on_gpu else None
        share = (host[part] if own is None else own) / whole
        rows.append(PartTime(part, host[part], own, share, flops.get(part)))
    if on_gpu:
        idle = whole - sum(device.values())
        rows.append(PartTime(IDLE, None, idle, idle / whole, None))
    return rows


def kind_times(reading: Reading, on_gpu: bool) -> list[KindTime]:
    """The kinds that occurred, in the order of ``KINDS``, which add up to the whole."""
    whole = _whole(reading, on_gpu)
    seconds = _seconds(reading.device if on_gpu else reading.host, reading, "kind")
    rows = [KindTime(kind, seconds[kind], seconds[kind] / whole) for kind in KINDS if kind in seconds]
    if on_gpu:
        idle = whole - sum(seconds.values())
        rows.append(KindTime(IDLE, idle, idle / whole))
    return rows


def operator_times(reading: Reading, on_gpu: bool) -> list[OperatorTime]:
    """Operators, or kernels, the most expensive first; without what is none, such as Python."""
    pieces = [piece for piece in (reading.device if on_gpu else reading.host) if piece.kind != BETWEEN]
    whole, count = _whole(reading, on_gpu), len(reading.iterations)
    seconds, calls = _seconds(pieces, reading, "name"), Counter(piece.name for piece in pieces)
    # An operator inside another one is of that one's kind: the last kind stands for all.
    kinds = {piece.name: piece.kind for piece in pieces}
    return [
        OperatorTime(name, kinds[name], calls[name] / count, time, time / whole)
        for name, time in sorted(seconds.items(), key=lambda item: -item[1])
    ]


def _whole(reading: Reading, on_gpu: bool) -> float:
    """Seconds of an outer iteration."""
    return 1e-9 * (reading.device_time if on_gpu else reading.host_time) / len(reading.iterations)


def _seconds(pieces: Iterable[Piece], reading: Reading, by: str) -> dict[str, float]:
    """Own time per outer iteration, by an attribute of the pieces."""
    totals: Counter[str] = Counter()
    for piece in pieces:
        totals[getattr(piece, by)] += piece.own
    return {name: 1e-9 * total / len(reading.iterations) for name, total in totals.items()}
