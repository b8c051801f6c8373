"""Means between log lines, and the guard that names what broke."""

from __future__ import annotations

import pytest
import torch

from mlomae.errors import UserError
from mlomae.meters import FiniteGuard, Meters, Scalars

FINE, BROKEN, ENDLESS = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("inf"))


def test_meters_give_means_over_iterations_and_start_again() -> None:
    meters = Meters()
    for value in (1.0, 2.0, 6.0):
        meters.add({"b": torch.tensor(value), "a": torch.tensor(10 * value, dtype=torch.float64)})
    assert Scalars(meters.take()).read() == {"a": 30.0, "b": 3.0}
    meters.add({"b": torch.tensor(5.0)})
    assert Scalars(meters.take()).read() == {"b": 5.0}


def test_meters_keep_values_that_change_later() -> None:
    meters, value = Meters(), torch.tensor(1.0)
    meters.add({"a": value})
    value.fill_(100.0)
    meters.add({"a": torch.tensor(3.0)})
    assert Scalars(meters.take()).read() == {"a": 2.0}


def test_meters_hold_no_graph() -> None:
    meters, value = Meters(), torch.tensor(2.0, requires_grad=True)
    meters.add({"a": value * 1})
    meters.add({"a": (value * 1).detach()})
    assert Scalars(meters.take()).read() == {"a": 2.0}
    assert value.grad is None


def test_guard_is_silent_while_everything_is_finite() -> None:
    guard = FiniteGuard()
    guard.check()
    for iteration in range(3):
        guard.watch("pretrain", iteration, FINE)
        guard.watch("head", iteration, FINE)
    guard.check()


@pytest.mark.parametrize("value", [BROKEN, ENDLESS, -ENDLESS])
def test_guard_names_the_level_and_the_first_iteration(value: torch.Tensor) -> None:
    guard = FiniteGuard()
    for iteration in range(10):
        guard.watch("pretrain", iteration, FINE)
        guard.watch("mask", iteration, value if iteration in (4, 5, 9) else FINE)
    with pytest.raises(
        UserError, match=r"^mask level: .* not finite at iteration 4;.* mask\.lr .* mask\.clip$"
    ):
        guard.check()


def test_guard_names_the_level_that_broke_first() -> None:
    guard = FiniteGuard()
    for iteration in range(5):
        guard.watch("pretrain", iteration, BROKEN if iteration >= 3 else FINE)
        guard.watch("head", iteration, BROKEN if iteration >= 2 else FINE)
    with pytest.raises(UserError, match=r"^head level: .* iteration 2;"):
        guard.check()


def test_guard_names_the_lowest_level_of_those_that_broke_together() -> None:
    # A broken autoencoder breaks the levels above it in the same iteration: it is the cause.
    guard = FiniteGuard()
    for level in ("pretrain", "head", "mask"):
        guard.watch(level, 7, BROKEN)
    with pytest.raises(UserError, match=r"^pretrain level: "):
        guard.check()


def test_guard_watches_every_value_of_a_level() -> None:
    guard = FiniteGuard()
    guard.watch("head", 0, FINE, BROKEN)
    with pytest.raises(UserError, match=r"^head level: .* iteration 0;"):
        guard.check()
