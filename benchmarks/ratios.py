"""Ratios of speed to a baseline that was timed in the same run, and the checked-in ones they are held to.

A time depends on the machine; how much faster one function is than another, timed in turns, depends on
it far less. ``ratios.json`` says what each ratio is expected to be, by kind of device:

    {"cpu": {"NAME": {"ratio": 1.8, "tolerance": 0.2, "baseline": "…", "machine": "…"}}}

A ratio is (time of the baseline) / (our time): more is better. It falls short below ratio * (1 - tolerance).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

Mode = Literal["judge", "update", "smoke"]
"""judge: against the file; update: the file takes what is found; smoke: figures mean nothing."""

DEFAULT_TOLERANCE = 0.2
"""Of a new entry: room for noise and for other machines. A narrower or wider one is written by hand."""


@dataclass(frozen=True)
class Expected:
    """An entry of the file.

    Attributes:
        tolerance: share of the ratio that may be missing.
        baseline: what our time is compared with.
        machine: where the ratio was measured.
    """

    ratio: float
    tolerance: float
    baseline: str
    machine: str

    @property
    def least(self) -> float:
        return self.ratio * (1 - self.tolerance)


@dataclass(frozen=True)
class Found:
    """A ratio that was measured.

    Attributes:
        at_least: what is required of it on every machine, whatever the file expects; None for nothing.
        expected: its entry in the file, None without one.
    """

    name: str
    value: float
    baseline: str
    at_least: float | None
    expected: Expected | None

    @property
    def bound(self) -> float | None:
        """The least that is accepted; None without an entry and a requirement."""
        bounds = [self.at_least, None if self.expected is None else self.expected.least]
        return max((bound for bound in bounds if bound is not None), default=None)


class Ratios:
    """All ratios of a session.

    Args:
        path: of the file; need not exist.
        device: the section: "cpu" or "cuda".
        machine: that measures, in words.

    Raises:
        ValueError: the file is not as described above.
    """

    def __init__(self, path: Path, device: str, machine: str, mode: Mode = "judge") -> None:
        self.path, self.device, self.machine, self.mode = path, device, machine, mode
        self.expected = _read(path).get(device, {})
        self.found: list[Found] = []

    def check(self, name: str, value: float, baseline: str, at_least: float | None = None) -> None:
        """Notes a ratio; ``problem`` says whether it will do, at the end of the benchmark and of the session.

        Args:
            name: ``folder/what/baseline``, unique in a session.
            value: median of (time of the baseline) / (our time).
            baseline: the baseline in words.
            at_least: see ``Found``.
        """
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name}: {value} is no ratio of times")
        if any(found.name == name for found in self.found):
            raise ValueError(f"{name}: measured twice in one session; ratios need names of their own")
        self.found.append(Found(name, value, baseline, at_least, self.expected.get(name)))

    def state(self, found: Found) -> str:
        """ok, SHORT or missing; smoke and updated where nothing is judged."""
        if self.mode == "smoke":
            return "smoke"
        if found.at_least is not None and found.value < found.at_least:
            return "SHORT"
        if self.mode == "update":
            return "updated"
        if found.expected is None:
            return "missing"
        return "ok" if found.value >= found.expected.least else "SHORT"

    def problem(self, found: Found) -> str | None:
        """What is wrong with a ratio, in one line; None where nothing is."""
        state = self.state(found)
        if state == "missing":
            return (
                f"missing: {found.name} (found {found.value:.3g}) has no entry for {self.device} in "
                f"{self.path.name}; on an idle machine, run the same command with --update-ratios to add it"
            )
        if state == "SHORT":
            due, reason = found.at_least, "required everywhere"
            if due is None or found.value >= due:
                assert found.expected is not None
                due = found.expected.least
                reason = f"expected {found.expected.ratio:.3g} within {found.expected.tolerance:.0%}"
            return (
                f"SHORT: {found.name}: {found.value:.3g} times as fast as {found.baseline}, "
                f"at least {due:.3g} was due ({reason})"
            )
        return None

    def problems(self) -> list[str]:
        """Of all ratios found."""
        return [problem for found in self.found if (problem := self.problem(found)) is not None]

    def rows(self) -> list[dict[str, Any]]:
        """The table of the session."""
        return [
            {
                "ratio": found.name,
                "baseline": found.baseline,
                "expected": None if found.expected is None else found.expected.ratio,
                "found": found.value,
                "tolerance": None if found.expected is None else f"{found.expected.tolerance:.0%}",
                "at least": found.bound,
                "": self.state(found),
            }
            for found in self.found
        ]

    def record(self) -> list[dict[str, Any]]:
        """The same for machines."""
        return [
            {
                "name": found.name,
                "ratio": found.value,
                "baseline": found.baseline,
                "expected": None if found.expected is None else found.expected.ratio,
                "tolerance": None if found.expected is None else found.expected.tolerance,
                "at_least": found.at_least,
                "state": self.state(found),
            }
            for found in self.found
        ]

    def write(self) -> None:
        """Puts what was found into the file; other entries and the tolerances stay."""
        tree = _read(self.path)
        section = tree.setdefault(self.device, {})
        for found in self.found:
            fresh = Expected(_rounded(found.value), DEFAULT_TOLERANCE, found.baseline, self.machine)
            old = section.get(found.name)
            section[found.name] = fresh if old is None else replace(fresh, tolerance=old.tolerance)
        self.path.write_text(_dump(tree))


def _read(path: Path) -> dict[str, dict[str, Expected]]:
    try:
        tree = json.loads(path.read_text()) if path.exists() else {}
        return {
            device: {name: _entry(name, entry) for name, entry in section.items()}
            for device, section in tree.items()
        }
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{path}: not a file of ratios ({error})") from None


def _entry(name: str, entry: Mapping[str, Any]) -> Expected:
    expected = Expected(**entry)
    if not (expected.ratio > 0 and 0 <= expected.tolerance < 1):
        raise ValueError(f"{name}: expected a ratio above 0 and a tolerance from 0 to below 1")
    return expected


def _dump(tree: Mapping[str, Mapping[str, Expected]]) -> str:
    """JSON with a line per entry, sorted: a changed ratio is a changed line."""
    sections = []
    for device in sorted(tree):
        lines = (
            f"    {json.dumps(name)}: {json.dumps(asdict(entry), ensure_ascii=False)}"
            for name, entry in sorted(tree[device].items())
        )
        sections.append(f"  {json.dumps(device)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(sections) + "\n}\n"


def _rounded(value: float) -> float:
    return float(f"{value:.3g}")
