"""Our function against its baselines: timed in turns, as ratios that are held to the checked-in ones."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.environment import slug
from benchmarks.ratios import Ratios
from benchmarks.timing import Function, interleaved, median_ratio

OURS = "ours"
ROUNDS, WARM_UP = 15, 3


@dataclass(frozen=True)
class Compared:
    """Seconds of every round, ``OURS`` first, and how many times as fast as each baseline we are."""

    seconds: dict[str, list[float]]
    ratios: dict[str, float]

    @property
    def medians(self) -> dict[str, float]:
        """Seconds."""
        return {name: statistics.median(values) for name, values in self.seconds.items()}


@dataclass(frozen=True)
class Compare:
    """Called once per test.

    Attributes:
        benchmark: pytest-benchmark's, which times our function.
        ratios: of the session.
        most_rounds: in a smoke run, which warms up once; None for a real one.
    """

    benchmark: BenchmarkFixture
    ratios: Ratios
    most_rounds: int | None

    def __call__(
        self,
        name: str,
        ours: Function,
        baselines: Mapping[str, Function],
        at_least: Mapping[str, float] | None = None,
        rounds: int = ROUNDS,
        warm_up: int = WARM_UP,
        before: Mapping[str, Function] | None = None,
    ) -> Compared:
        """Times all of them and checks a ratio called ``name/baseline`` for each baseline.

        Args:
            name: ``folder/what``.
            baselines: by what they are, in words.
            at_least: what is required of a ratio on every machine, by baseline.
            rounds, warm_up: after as many rounds of warm-up.
            before: see ``interleaved``.
        """
        if self.most_rounds is not None:
            rounds, warm_up = max(1, min(rounds, self.most_rounds)), 1
        self.benchmark.group = name.partition("/")[0]
        seconds = interleaved({OURS: ours, **baselines}, rounds, warm_up, self.benchmark, before)
        found = {baseline: median_ratio(seconds[baseline], seconds[OURS]) for baseline in baselines}
        for baseline, ratio in found.items():
            self.ratios.check(f"{name}/{slug(baseline)}", ratio, baseline, (at_least or {}).get(baseline))
        self.benchmark.extra_info.update({f"{baseline} / ours": ratio for baseline, ratio in found.items()})
        return Compared(seconds, found)
