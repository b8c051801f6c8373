"""Means and maxima between log lines."""

from __future__ import annotations

import math

import torch

from mlomae.meters import Meters, Peaks, Scalars


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


def test_peaks_are_the_largest_since_the_last_read() -> None:
    peaks = Peaks()
    for value in (1.0, 6.0, 2.0):
        peaks.add({"a": torch.tensor(value)})
    half = peaks.state_dict()
    peaks.add({"a": torch.tensor(3.0)})
    assert Scalars(peaks.take()).read() == {"a": 6.0}
    peaks.add({"a": torch.tensor(5.0)})
    assert Scalars(peaks.take()).read() == {"a": 5.0}

    peaks.load_state_dict(half, torch.device("cpu"))
    peaks.add({"a": torch.tensor(3.0)})
    assert Scalars(peaks.take()).read() == {"a": 6.0}
    peaks.add({"a": torch.tensor(3.0)})
    peaks.add({"a": torch.tensor(float("nan"))})
    assert Scalars(peaks.take()).read() == {"a": math.inf}
