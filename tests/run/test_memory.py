"""Peak memory on the CPU: every storage once, from its first use to its last."""

from __future__ import annotations

import torch
from torch import Tensor

from mlomae.memory import peak_bytes

CPU = torch.device("cpu")
UNIT = 4 * 1000


def numbers(units: int) -> Tensor:
    return torch.zeros(units, 1000)


def test_freed_memory_does_not_count_again() -> None:
    def run() -> None:
        a = numbers(1)
        b = numbers(2)
        del a
        c = numbers(1)
        assert b is not c

    assert peak_bytes(run, CPU) == 3 * UNIT


def test_views_and_updates_in_place_cost_nothing() -> None:
    def run() -> None:
        a = numbers(3)
        a.view(-1)[10:].add_(1)
        a.t().mul_(2)

    assert peak_bytes(run, CPU) == 3 * UNIT


def test_what_was_there_before_does_not_count() -> None:
    before = numbers(50)
    assert peak_bytes(lambda: before.add_(1), CPU) == 0
    assert peak_bytes(lambda: before.view(-1), CPU) == 0
    assert peak_bytes(lambda: before + 1, CPU) == 50 * UNIT


def test_activations_kept_for_the_backward_pass_count() -> None:
    weight = numbers(1).requires_grad_()

    def run() -> None:
        x = weight
        for _ in range(5):
            x = x.tanh()
        x.sum().backward()

    assert peak_bytes(run, CPU) >= 5 * UNIT
    with torch.no_grad():
        assert peak_bytes(lambda: weight.tanh().tanh().tanh(), CPU) == 2 * UNIT
