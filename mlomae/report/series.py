"""A scalar of a run over its steps, and how few points still show it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

MAX_POINTS = 600
"""Of a curve on the page: more than a small plot has pixels."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Series:
    """Values over increasing steps.

    Attributes:
        steps: [T].
        values: [T], NaN where the value was not finite.
    """

    steps: NDArray[np.int64]
    values: Floats

    def finite(self) -> Floats:
        """The finite values, in order."""
        return self.values[np.isfinite(self.values)]

    def thinned(self, limit: int = MAX_POINTS) -> Series:
        """At most ``limit`` points: first, last, the extremes of each stretch between, and its gaps.

        Args:
            limit: at least 5.
        """
        total = len(self.values)
        if total <= limit:
            return self
        missing = ~np.isfinite(self.values)
        stretches = (limit - 2) // (3 if missing.any() else 2)
        edges = np.linspace(1, total - 1, stretches + 1).round().astype(np.int64)
        chosen = {0, total - 1}
        for start, stop in pairwise(edges):
            gaps = np.flatnonzero(missing[start:stop])
            chosen.update(start + gaps[:1])
            if len(gaps) < stop - start:
                chosen.add(start + int(np.nanargmin(self.values[start:stop])))
                chosen.add(start + int(np.nanargmax(self.values[start:stop])))
        kept = np.array(sorted(chosen))
        return Series(self.steps[kept], self.values[kept])
