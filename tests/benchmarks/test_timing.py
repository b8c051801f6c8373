"""Whose turn it is, and whose time: with a clock that the functions move themselves."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks import timing
from benchmarks.timing import Stopwatch, interleaved, median_ratio
from tests.architecture.source_tree import ROOT


class Clock:
    """Stands in for the time; a function that takes ``seconds`` moves it."""

    def __init__(self) -> None:
        self.now = 0.0
        self.turns: list[str] = []

    def perf_counter(self) -> float:
        return self.now

    def work(self, name: str, seconds: float) -> None:
        self.turns.append(name)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(timing.time, "perf_counter", clock.perf_counter)
    return clock


def test_functions_take_turns(clock: Clock) -> None:
    functions = {"a": lambda: clock.work("a", 1.0), "b": lambda: clock.work("b", 3.0)}
    seconds = interleaved(functions, rounds=2, warm_up=1, before={"b": lambda: clock.work("before b", 10.0)})
    assert clock.turns == ["a", "before b", "b"] * 3
    assert seconds == {"a": [1.0, 1.0], "b": [3.0, 3.0]}
    assert median_ratio(seconds["b"], seconds["a"]) == 3.0


class Whole:
    """Calls its part, directly and by way of another one."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def run(self) -> None:
        self.clock.work("run", 1.0)
        self.part()
        self.other()

    def other(self) -> None:
        self.clock.work("other", 10.0)
        self.part()

    def part(self) -> None:
        self.clock.work("part", 100.0)


@pytest.mark.parametrize(
    ("within", "expected"),
    [
        (None, {"run": 1.0, "other": 10.0, "part": 200.0}),
        ("run", {"run": 1.0, "other": 110.0, "part": 100.0}),
    ],
)
def test_a_part_counts_for_itself_only(
    clock: Clock, monkeypatch: pytest.MonkeyPatch, within: str | None, expected: dict[str, float]
) -> None:
    whole, stopwatch = Whole(clock), Stopwatch(monkeypatch)
    stopwatch.watch("run", whole, "run")
    stopwatch.watch("other", whole, "other")
    stopwatch.watch("part", whole, "part", within=within)
    for _ in range(2):  # the second time: nothing of the first is left
        whole.run()
        assert stopwatch.read() == expected


def test_studies_run_where_they_are_named_only(monkeypatch: pytest.MonkeyPatch) -> None:
    # In a test process of pytest-xdist, pytest-benchmark warns that it times nothing.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "benchmarks", "benchmarks/peers"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "benchmarks/peers/test_peers.py" in done.stdout
    assert "benchmarks/kernels/test_operators.py" in done.stdout
    assert "benchmarks/studies" not in done.stdout
