"""Learning rates over a run."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from mlomae.mlo.schedule import warmup_cosine


def _rates(iterations: int, lr: float = 1.0, min_lr: float = 0.1, warmup: float = 0.2) -> list[float]:
    return [warmup_cosine(i, iterations, lr, min_lr, warmup) for i in range(iterations)]


def test_warm_up_is_linear_and_never_zero() -> None:
    rates = _rates(50)
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])


def test_highest_rate_follows_warm_up_and_the_last_is_the_lowest() -> None:
    rates = _rates(50)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[-1] == pytest.approx(0.1, abs=1e-15)
    assert all(a > b for a, b in pairwise(rates[10:]))


def test_cosine_is_half_way_down_in_the_middle() -> None:
    assert _rates(51, warmup=0.0)[25] == pytest.approx(0.55)


def test_without_warm_up_the_first_rate_is_the_highest() -> None:
    assert _rates(10, warmup=0.0)[0] == 1.0


def test_constant_rate_when_both_ends_are_equal() -> None:
    assert _rates(10, min_lr=1.0, warmup=0.0) == [1.0] * 10


@pytest.mark.parametrize("warmup", [0.0, 0.05, 1.0])
def test_a_single_iteration_runs_at_the_highest_rate(warmup: float) -> None:
    assert _rates(1, warmup=warmup) == [1.0]


def test_warm_up_over_the_whole_run_ends_at_the_highest_rate() -> None:
    assert _rates(8, warmup=1.0) == pytest.approx([(i + 1) / 8 for i in range(8)])


@pytest.mark.parametrize(("iterations", "warmup"), [(2, 0.0), (3, 0.05), (7, 0.5), (100, 0.05), (100, 0.98)])
def test_last_iteration_reaches_the_lowest_rate(iterations: int, warmup: float) -> None:
    assert math.isclose(_rates(iterations, warmup=warmup)[-1], 0.1, abs_tol=1e-15)


def test_one_iteration_after_warm_up_stays_at_the_highest_rate() -> None:
    assert _rates(10, warmup=0.9)[-1] == 1.0
