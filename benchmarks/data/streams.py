"""Endless streams of batches, ours and torchvision's: read in rounds, each beginning in the same state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from benchmarks.comparison import OURS, Compare, Compared
from benchmarks.report import Report
from benchmarks.timing import Function
from mlomae.data.batches import Batch

PLAIN_READING = {
    # Next to nothing is kept back, so that both sides read the same images.
    "data.heldout_fraction": "0.01",
    "data.test_fraction": "0.01",
    "masking.policy": "random",
    "device": "cpu",
}
"""What our stream is configured with beside its data."""


class Stream(Protocol):
    """A stream; ``next`` starts its loader processes where there are none, ``close`` ends them."""

    def next(self) -> Batch: ...

    def close(self) -> None: ...


def read(stream: Stream, batches: int) -> Function:
    """Reads so many batches."""

    def read_all() -> None:
        for _ in range(batches):
            stream.next()

    return read_all


def alone(streams: Mapping[str, Stream]) -> dict[str, Function]:
    """What comes before a stream's turn, by name: others' processes end, its own start and read a batch.

    So each stream begins its turn with the same number of batches under way, and with the machine to itself.
    """

    def start(stream: Stream) -> Function:
        def restart() -> None:
            for each in streams.values():
                each.close()
            stream.next()

        return restart

    return {name: start(stream) for name, stream in streams.items()}


def compare_streams(
    compare: Compare,
    name: str,
    ours: Stream,
    baselines: Mapping[str, Stream],
    batches: int,
    at_least: float,
    rounds: int,
    warm_up: int,
) -> Compared:
    """Times rounds of ``batches``; every stream has to be ``at_least`` times as slow as ours. Closes all."""
    streams = {OURS: ours, **baselines}
    compared = compare(
        name,
        read(ours, batches),
        {name: read(stream, batches) for name, stream in baselines.items()},
        at_least=dict.fromkeys(baselines, at_least),
        rounds=rounds,
        warm_up=warm_up,
        before=alone(streams),
    )
    for stream in streams.values():
        stream.close()
    return compared


def show_speeds(report: Report, title: str, images: int, workers: int, compared: Compared) -> None:
    """A table of images per second, and per core; ``images`` are those of a round."""
    report.table(
        f"{title}, {f'{workers} workers' if workers else 'no workers'}, a thread each, medians",
        [
            {
                "loader": name,
                "images/s": images / seconds,
                "images/s per core": images / seconds / max(1, workers),
                "ours / it": compared.ratios.get(name),
            }
            for name, seconds in compared.medians.items()
        ],
    )
