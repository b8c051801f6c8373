"""Means over seeds, and differences between arms, seed by seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from mlomae.study.plan import Budget
from mlomae.study.results import Results, Row

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Difference:
    """A mean of paired differences and its confidence interval.

    Attributes:
        mean: over seeds.
        half: half the width of the interval, of Student's t; None for a single pair.
        pairs: seeds that both arms have.
    """

    mean: float
    half: float | None
    pairs: int

    @property
    def excludes_zero(self) -> bool:
        return self.half is not None and abs(self.mean) > self.half


@dataclass(frozen=True)
class Compared:
    """An arm under one budget.

    Attributes:
        rows: its runs, by seed.
        differences: figure → to its baseline; empty for a baseline.
    """

    arm: str
    rows: tuple[Row, ...]
    differences: dict[str, Difference]

    def mean(self, figure: str) -> float:
        return fmean(row.figures[figure] for row in self.rows)

    def sd(self, figure: str) -> float | None:
        """Standard deviation of a sample; None for a single run."""
        values = [row.figures[figure] for row in self.rows]
        return stdev(values) if len(values) > 1 else None


def compare(results: Results, budget: Budget) -> list[Compared]:
    """All arms that have finished runs under a budget, in the order of the study."""
    found = []
    for name, arm in results.study.arms.items():
        rows = _by_seed(results.rows, name, budget)
        if rows:
            base = {} if arm.against is None else _by_seed(results.rows, arm.against, budget)
            pairs = [(row, base[seed]) for seed, row in rows.items() if seed in base]
            found.append(Compared(name, tuple(rows.values()), dict(_differences(pairs))))
    return found


def difference(values: Sequence[float]) -> Difference:
    """Of paired differences, one or more."""
    if len(values) < 2:
        return Difference(fmean(values), None, len(values))
    from scipy.stats import t

    quantile = float(t.ppf((1 + CONFIDENCE) / 2, len(values) - 1))
    return Difference(fmean(values), quantile * stdev(values) / math.sqrt(len(values)), len(values))


def _by_seed(rows: Sequence[Row], arm: str, budget: Budget) -> Mapping[int, Row]:
    found = {row.seed: row for row in rows if row.arm == arm and budget in row.budgets}
    return dict(sorted(found.items()))


def _differences(pairs: Sequence[tuple[Row, Row]]) -> Iterator[tuple[str, Difference]]:
    for figure in pairs[0][0].figures if pairs else ():
        # An evaluation may be that of some arms only.
        if figure not in pairs[0][1].figures:
            continue
        yield figure, difference([row.figures[figure] - base.figures[figure] for row, base in pairs])
