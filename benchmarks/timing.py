"""Times that are compared are taken in turns, in one run; and a stopwatch for the parts of a whole."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

Function = Callable[[], object]


def interleaved(
    functions: Mapping[str, Function],
    rounds: int,
    warm_up: int,
    benchmark: BenchmarkFixture | None = None,
    before: Mapping[str, Function] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each function in each round; in a round each has one turn, so that load meets all of them.

    Args:
        warm_up: rounds before the first one that counts.
        benchmark: times the first function, which then appears in pytest-benchmark's table and files.
        before: what has to be done before a function's turn, untimed, by the function's name.
    """
    prepare = before or {}
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    first = next(iter(functions))

    def take_turns(skipped: str | None = None) -> None:
        for name, function in functions.items():
            if name != skipped:
                prepare.get(name, _nothing)()
                seconds[name].append(_seconds(function))

    def all_turns() -> None:
        for _ in range(warm_up + rounds):
            take_turns()

    def others() -> None:
        take_turns(skipped=first)
        prepare.get(first, _nothing)()

    if benchmark is None:
        all_turns()
    elif benchmark.disabled:
        benchmark.pedantic(all_turns)  # called once and not timed
    else:
        benchmark.pedantic(functions[first], setup=others, rounds=rounds, warmup_rounds=warm_up)
        seconds[first] = list(benchmark.stats.stats.data)
    return {name: values[-rounds:] for name, values in seconds.items()}


def median_ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """Median over the rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


class Stopwatch:
    """Seconds spent in watched methods by part; what a watched method calls counts for that part only."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._inside = 0.0
        self._current: str | None = None
        self._monkeypatch = monkeypatch

    def watch(self, part: str, owner: object, method: str, within: str | None = None) -> None:
        """Counts the time in ``owner.method`` for a part.

        Args:
            within: count it only when this part makes the call; elsewhere it stays the caller's time.
        """
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if within is not None and self._current != within:
                return original(*args, **kwargs)
            caller, self._current = self._current, part
            outside, self._inside = self._inside, 0.0
            started = time.perf_counter()
            result = original(*args, **kwargs)
            elapsed = time.perf_counter() - started
            self._seconds[part] += elapsed - self._inside
            self._inside = outside + elapsed
            self._current = caller
            return result

        self._monkeypatch.setattr(owner, method, timed)

    def read(self) -> dict[str, float]:
        """Seconds by part since the last read."""
        seconds = dict(self._seconds)
        self._seconds.clear()
        return seconds


def _seconds(function: Function) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def _nothing() -> None: ...
