"""The radius finds its best value, and knows its error, on differences whose errors are known."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mlomae.mlo.radius import LARGEST, SMALLEST, Radius

N = 4000
EXACT = torch.linspace(1, 2, N, dtype=torch.float64)


def difference(order: int, truncation: float, rounding: float) -> Callable[[float], Tensor]:
    """A difference with ``truncation * r^order`` and ``rounding / r`` relative error, the latter random."""
    generator = torch.Generator().manual_seed(0)
    curvature = torch.randn(N, generator=generator, dtype=torch.float64)

    def at(radius: float) -> Tensor:
        noise = torch.randn(N, generator=generator, dtype=torch.float64)
        size = EXACT.square().mean().sqrt()
        return EXACT + size * (truncation * radius**order * curvature + rounding / radius * noise)

    return at


def norm(vector: Tensor) -> float:
    return float(vector.norm())


def true_error(values: Tensor) -> float:
    return norm(values - EXACT) / norm(EXACT)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("start", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize(("truncation", "rounding"), [(1e4, 1e-9), (1.0, 1e-6), (1e2, 1e-5)])
def test_adaptive_radius_comes_near_the_least_error(
    order: int, start: float, truncation: float, rounding: float
) -> None:
    at = difference(order, truncation, rounding)
    best = (rounding / truncation / math.sqrt(order)) ** (1 / (order + 1))
    best = min(max(best, SMALLEST), LARGEST)
    radius = Radius(start, order, adaptive=True)
    values = radius.check(at, norm)
    assert radius.error is not None
    # Around the optimum the error is flat: within twice the radius, it is at most 3 times the least.
    assert best / 2.5 <= radius.value <= best * 2.5
    assert true_error(values) <= 3 * true_error(at(best))
    assert radius.error == pytest.approx(true_error(values), rel=0.5)


def differences(order: int, truncation: float, rounding: float) -> tuple[float, float]:
    """Norms of D(2r) - D(r) and D(r) - D(r/2), whose errors are these at r."""
    wide = (2**order - 1) ** 2 * truncation**2 + 1.25 * rounding**2
    narrow = (1 - 2**-order) ** 2 * truncation**2 + 5 * rounding**2
    return math.sqrt(wide), math.sqrt(narrow)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("truncation", "rounding"), [(1.0, 0.0), (0.0, 1.0), (0.3, 0.2), (1e-3, 2.0)])
def test_two_differences_tell_both_errors(order: int, truncation: float, rounding: float) -> None:
    wide, narrow = differences(order, truncation, rounding)
    found = Radius(1e-3, order, adaptive=True)._split(wide**2, narrow**2)
    assert found == pytest.approx((truncation**2, rounding**2), rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("order", [1, 2])
def test_the_radius_moves_where_the_least_error_is_far_enough(order: int) -> None:
    radius = Radius(1e-3, order, adaptive=True)
    # At the best radius the squares have the ratio `order`.
    wide, narrow = differences(order, 1.0, math.sqrt(order))
    least, pure_rounding = narrow / wide, 2.0
    larger, smaller = math.sqrt(least * pure_rounding), 0.8 * least
    moves = [radius._move(1.0, ratio) for ratio in (1.001 * larger, 0.999 * larger, least)]
    assert moves == [2.0, 1.0, 1.0]
    assert [radius._move(1.0, ratio) for ratio in (1.001 * smaller, 0.999 * smaller)] == [1.0, 0.5]


@pytest.mark.parametrize("radius", [1e-6, 1e-4, 1e-2])
def test_fixed_radius_stays_and_its_error_is_estimated(radius: float) -> None:
    at = difference(2, 1e2, 1e-6)
    fixed = Radius(radius, 2, adaptive=False)
    values = fixed.check(at, norm)
    assert fixed.value == radius
    assert fixed.error == pytest.approx(true_error(values), rel=0.5)


def test_radius_stays_within_its_limits() -> None:
    only_rounding, only_truncation = difference(2, 0.0, 1e-9), difference(2, 1e12, 0.0)
    wide, narrow = Radius(1e-2, 2, adaptive=True), Radius(1e-6, 2, adaptive=True)
    wide.check(only_rounding, norm)
    narrow.check(only_truncation, norm)
    # Within the factor that is left alone.
    assert LARGEST / 2 <= wide.value <= LARGEST
    assert SMALLEST <= narrow.value <= 2 * SMALLEST


@pytest.mark.parametrize("value", [0.0, math.nan])
def test_without_a_difference_nothing_moves(value: float) -> None:
    radius = Radius(1e-4, 2, adaptive=True)
    radius.check(lambda _: torch.full((3,), value), norm)
    assert radius.value == 1e-4 and radius.error is None


@pytest.mark.parametrize("start", [1e-5, 5e-3])
def test_search_comes_back_from_where_the_derivative_is_forgotten(start: float) -> None:
    """tanh(k r) / (k r): right below r = 1 / k, then it decays without any sign of curvature."""
    noise = difference(2, 0.0, 1e-5)

    def at(radius: float) -> Tensor:
        return noise(radius) * (math.tanh(1e3 * radius) / (1e3 * radius))

    radius = Radius(1e-5, 2, adaptive=True)
    radius.value = start
    values = radius.check(at, norm)
    assert 5e-5 < radius.value < 1e-3
    assert true_error(values) < 0.2


def test_a_move_costs_one_difference() -> None:
    asked: list[float] = []
    at = difference(2, 1e2, 1e-6)

    def counted(radius: float) -> Tensor:
        asked.append(radius)
        return at(radius)

    radius = Radius(1e-5, 2, adaptive=True)
    radius.check(counted, norm)
    moves = round(math.log2(radius.value / 1e-5))
    assert moves > 3
    assert len(asked) == len(set(asked)) <= moves + 4


def test_search_stays_below_where_the_differences_overflow() -> None:
    noise = difference(2, 0.0, 1e-6)
    radius = Radius(1e-5, 2, adaptive=True)
    values = radius.check(lambda r: noise(r) * (math.inf if r > 1e-3 else 1.0), norm)
    assert values.isfinite().all()
    assert 1e-5 < radius.value < 1e-3 and radius.error is not None
