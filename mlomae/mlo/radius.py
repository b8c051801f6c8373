"""The radius of a finite difference: how far to step, and how wrong the result is.

A difference D(r) at radius r errs by truncation, which grows as r^q (q = 2 central, 1 one-sided), and by
rounding, which falls as 1 / r. Two more radii tell both apart: with t and s their squares at r,

    |D(2r) - D(r)|²  =  (2^q - 1)² t + (1 + 1/4) s
    |D(r) - D(r/2)|² =  (1 - 2^-q)² t + (1 + 4) s

The error is sqrt(t + s), and least where s = q t. The search walks to there on a grid of powers of two, so
that a move costs one new difference. It comes from below: far above the best radius a difference forgets
the derivative, and what is left looks like rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

SMALLEST, LARGEST = 1e-7, 0.1
MAX_MOVES = 20
# An error above this one may be that of a radius far too large: the search begins again from below.
DOUBTFUL, HOPELESS = 0.2, 0.5

Difference = Callable[[float], Tensor]
Norm = Callable[[Tensor], float]


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

    def __post_init__(self) -> None:
        self._start = self.value

    def check(self, at: Difference, norm: Norm) -> Tensor:
        """Estimates the error against half and double the radius, and moves to a better one.

        Args:
            at: the difference at a radius.
            norm: of a difference, over all ranks: every rank has to see the same number.

        Returns:
            The difference at the radius that is left.
        """
        known: dict[float, Tensor] = {}

        def cached(radius: float) -> Tensor:
            if radius not in known:
                known[radius] = at(radius)
            return known[radius]

        self._search(cached, norm)
        if self.adaptive and self.value > self._start and self.error is not None and self.error > DOUBTFUL:
            self.value = self._start
            self._search(cached, norm)
        return cached(self.value)

    def _search(self, at: Difference, norm: Norm) -> None:
        errors: dict[float, float] = {}
        while len(errors) < MAX_MOVES:
            middle = at(self.value)
            size, wide, narrow = (
                norm(middle), norm(at(2 * self.value) - middle), norm(middle - at(self.value / 2))
            )  # fmt: skip
            if not (math.isfinite(size + wide + narrow) and size > 0):
                break
            wide, narrow = wide / size, narrow / size
            errors[self.value] = self.error = math.sqrt(sum(self._split(wide**2, narrow**2)))
            move = self._move(wide, narrow)
            if move == 1 and self.error > HOPELESS:
                # Nothing is resolved here, not even which way to go.
                move = 2.0
            ahead = self.value * move
            if not self.adaptive or not SMALLEST <= ahead <= LARGEST or ahead in errors:
                break
            self.value = ahead
        if errors:
            self.value = min(errors, key=errors.__getitem__)
            self.error = errors[self.value]

    def _move(self, wide: float, narrow: float) -> float:
        """2, 1 or 1/2: towards where the ratio of the two differences is that of the least error."""
        a, b = self._factors()
        least = math.sqrt((b + 5 * self.order) / (a + 1.25 * self.order))
        # Pure rounding has ratio 2: the border to it lies half-way, on a log scale. That to truncation is
        # strict, because far above the best radius the ratio rises again.
        if narrow > wide * math.sqrt(least * 2):
            return 2.0
        return 0.5 if narrow < wide * 0.8 * least else 1.0

    def _split(self, wide: float, narrow: float) -> tuple[float, float]:
        """Squared truncation and rounding errors, from the squares of the two differences."""
        a, b = self._factors()
        determinant = 5 * a - 1.25 * b
        truncation = (5 * wide - 1.25 * narrow) / determinant
        rounding = (a * narrow - b * wide) / determinant
        return max(0.0, truncation), max(0.0, rounding)

    def _factors(self) -> tuple[float, float]:
        return (2.0**self.order - 1) ** 2, (1 - 2.0**-self.order) ** 2
