"""The radius of a finite difference: how far to step, and how wrong the result is.

A difference D(r) at radius r errs by truncation, which grows as r^q (q = 2 central, 1 one-sided), and by
rounding, which falls as 1 / r. Two more radii tell both apart: with t and s their squares at r,

    |D(2r) - D(r)|²  =  (2^q - 1)² t + (1 + 1/4) s
    |D(r) - D(r/2)|² =  (1 - 2^-q)² t + (1 + 4) s

The error is sqrt(t + s); at x r it is sqrt(t x^2q + s / x²), least at x = (s / (q t))^(1 / (2q + 2)).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

# One check moves the radius by no more than this factor: the model of the error holds nearby only.
MAX_FACTOR = 8.0
SMALLEST, LARGEST = 1e-7, 0.1
# A radius within this factor of the best one is left alone: around it the error is flat.
TOLERANCE = 2.0
MAX_ROUNDS = 6


@dataclass
class Radius:
    """A radius relative to ``||theta||`` that follows its error, if it is allowed to.

    Attributes:
        value: the present radius.
        order: q above.
        adaptive: whether ``check`` may move it.
        error: estimated relative error at the last check, None before.
    """

    value: float
    order: int
    adaptive: bool
    error: float | None = None

    def check(self, at: Callable[[float], Tensor], norm: Callable[[Tensor], float]) -> Tensor:
        """Estimates the error against half and double the radius, and moves to a better one.

        Args:
            at: the difference at a radius.
            norm: of a difference, over all ranks: every rank has to see the same number.

        Returns:
            The difference at the radius that is left.
        """
        for _ in range(MAX_ROUNDS):
            middle = at(self.value)
            size = norm(middle)
            if not (math.isfinite(size) and size > 0):
                return middle
            wide, narrow = norm(at(2 * self.value) - middle) / size, norm(middle - at(self.value / 2)) / size
            truncation, rounding = self._split(wide**2, narrow**2)
            self.error = math.sqrt(truncation + rounding)
            best = self._best(truncation, rounding)
            if not self.adaptive or 1 / TOLERANCE <= best / self.value <= TOLERANCE:
                return middle
            self.value = best
        return at(self.value)

    def _split(self, wide: float, narrow: float) -> tuple[float, float]:
        """Squared truncation and rounding errors, from the squares of the two differences."""
        a, b = (2.0**self.order - 1) ** 2, (1 - 2.0**-self.order) ** 2
        determinant = 5 * a - 1.25 * b
        return max(0.0, (5 * wide - 1.25 * narrow) / determinant), max(
            0.0, (a * narrow - b * wide) / determinant
        )

    def _best(self, truncation: float, rounding: float) -> float:
        power = 1 / (2 * self.order + 2)
        smallest = MAX_FACTOR ** (-1 / power)
        ratio = rounding / (self.order * truncation) if truncation else 1 / smallest
        factor = min(max(ratio, smallest), 1 / smallest) ** power
        return min(max(self.value * factor, SMALLEST), LARGEST)
