"""What a benchmark hands over: tables on the screen, bars that are checked, and one record."""

from __future__ import annotations

import math
import operator
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.environment import slug
from mlomae.run_dir import to_json

_RELATIONS: dict[str, Callable[[float, float], bool]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">=": operator.ge,
}


@dataclass(frozen=True)
class Spread:
    """Mean of n values, and their standard deviation (of a sample; None for a single value)."""

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        sd = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), sd, len(values))

    def __str__(self) -> str:
        return _text(self.mean) if self.sd is None else f"{_text(self.mean)} ± {self.sd:.2g}"


Cell = str | int | float | Spread | None
Row = Mapping[str, Cell]


@dataclass(frozen=True)
class Bar:
    """A figure that has to be reached: ``value relation bound``."""

    what: str
    value: float
    relation: str
    bound: float

    @property
    def met(self) -> bool:
        """False also for NaN."""
        return _RELATIONS[self.relation](self.value, self.bound)


class Report:
    """Collects the tables and bars of one benchmark and shows each at once.

    Args:
        name: of the benchmark, part of the record's file name.
        command: regenerates the record, from the root of a clone.
        environment: see ``benchmarks.environment``.
        uncaptured: opens a context in which standard output reaches the screen.
    """

    def __init__(
        self,
        name: str,
        command: str,
        environment: Mapping[str, Any],
        uncaptured: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self.name = name
        self._head = {"benchmark": name, "command": command, **environment}
        self._tables: dict[str, list[dict[str, Any]]] = {}
        self._bars: list[Bar] = []
        self._uncaptured = uncaptured

    def say(self, text: str) -> None:
        """Shows a line; it is not recorded."""
        self._print(text)

    def table(self, title: str, rows: Sequence[Row]) -> None:
        """Shows and records rows with the same keys, which are the column names."""
        self._tables[title] = [
            {name: asdict(cell) if isinstance(cell, Spread) else cell for name, cell in row.items()}
            for row in rows
        ]
        self._show(title, rows)

    def check(self, *bars: Bar) -> None:
        """Shows and records the bars, then fails the benchmark if one is missed."""
        self.add(*bars)
        missed = [bar for bar in bars if not bar.met]
        assert not missed, missed

    def add(self, *bars: Bar) -> None:
        """Shows and records the bars."""
        self._bars += bars
        rows = [
            {"bar": bar.what, "found": bar.value, "": bar.relation, "bound": bar.bound,
             "met": "yes" if bar.met else "NO"}
            for bar in bars
        ]  # fmt: skip
        self._show("bars", rows)

    def write(self, folder: Path) -> None:
        """Writes a new record, if there is anything to record; one that exists is never touched."""
        if not self._tables:
            return
        now = datetime.now(UTC)
        content = {
            "date": now.isoformat(timespec="seconds"),
            **self._head,
            "tables": self._tables,
            "bars": [asdict(bar) | {"met": bar.met} for bar in self._bars],
        }
        name = f"{now:%Y-%m-%dT%H%M%SZ}_{self.name}_{slug(_measured(self._head['machine']))}.json"
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / name, "x") as file:
            file.write(to_json(content, indent=2) + "\n")
        self.say(f"recorded {folder.name}/{name}")

    def _show(self, title: str, rows: Sequence[Row]) -> None:
        self._print(f"{self.name}: {title}", markdown(rows))

    def _print(self, *what: str | Table) -> None:
        with self._uncaptured():
            console = Console(file=sys.stdout, width=160, color_system=None, markup=False, highlight=False)
            console.print("", *what, sep="\n")


OpenReport = Callable[[str, str], AbstractContextManager[Report]]
"""(name, test or file that regenerates it) → the report; what a benchmark of several tests opens once."""


def markdown(rows: Sequence[Row]) -> Table:
    """Rows with the same keys as a Markdown table: readable on a screen, and in a document as it is."""
    table = Table(*rows[0], box=box.MARKDOWN)
    for row in rows:
        table.add_row(*(_text(cell) for cell in row.values()))
    return table


def _measured(machine: Mapping[str, str]) -> str:
    return machine["cpu"] if machine["device"] == "cpu" else machine["device"]


def _text(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, float):
        return f"{cell:,.0f}" if math.isfinite(cell) and abs(cell) >= 1000 else f"{cell:.4g}"
    return str(cell)
