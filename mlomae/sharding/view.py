"""What ``mlomae shards`` prints: a bar while it works, tables, and plain values for ``--json``."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Table
from rich.text import Text

from mlomae.data.shards.table import ShardIndex
from mlomae.sharding.report import Verification
from mlomae.sharding.statistics import PartStatistics, SplitStatistics, Spread

MOST_PROBLEMS = 100  # lines of a table
FEW = 5  # classes at either end
_WIDE = 1000  # columns where nobody looks: a line is a line then


class Bar:
    """A bar on a terminal, and nothing elsewhere."""

    def __init__(self, unit: str, shown: bool = True) -> None:
        """
        Args:
            unit: of what is counted.
            shown: a terminal, too, stays without one otherwise.
        """
        console = Console(highlight=False)
        self._bar: RichProgress | None = None
        self._started = time.monotonic()
        if shown and sys.stdout.isatty() and not console.is_dumb_terminal:
            self._bar = RichProgress(
                TextColumn(f"{{task.completed}}/{{task.total}} {unit}"),
                BarColumn(),
                TextColumn("{task.fields[text]}", markup=False),
                TimeRemainingColumn(),
                console=console,
            )
            self._task = self._bar.add_task("", total=None, text="")

    def __enter__(self) -> Bar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, total: int, text: str = "") -> None:
        if self._bar is not None:
            # Not earlier: processes are forked before the bar has its thread.
            self._bar.start()
            self._bar.update(self._task, completed=done, total=total, text=text)

    def update_images(self, images: int, of_images: int, shards: int, of_shards: int) -> None:
        """The same with the speed, and the shards that are done."""
        speed = images / max(time.monotonic() - self._started, 1e-9)
        self.update(images, of_images, f"{speed:,.0f} images/s  {shards}/{of_shards} shards")


def describe(index: ShardIndex) -> str:
    """One line about a part."""
    size = show_bytes(sum(shard.num_bytes for shard in index.shards))
    return f"{len(index.samples):,} samples in {len(index.shards):,} shards, {size}"


def show_bytes(count: float) -> str:
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def show_verification(result: Verification) -> None:
    """Prints a line per problem, and a summary."""
    console = _console()
    if result.problems:
        table = Table("shard", "found", "expected", box=None, pad_edge=False)
        for problem in result.problems[:MOST_PROBLEMS]:
            table.add_row(*(Text(text, overflow="fold") for text in asdict(problem).values()))
        console.print(table)
    more = len(result.problems) - MOST_PROBLEMS
    if more > 0:
        console.print(f"and {more:,} more; --json lists them all")
    checked = f"{result.shards:,} shards, {result.samples:,} samples, {show_bytes(result.num_bytes)}"
    if result.known_faults:
        checked += f"; {result.known_faults:,} bad samples are known to the index"
    if result.unindexed:
        checked += f"; no index of {', '.join(result.unindexed)}"
    count = len(result.problems)
    verdict = f"{count:,} problem{'s' if count > 1 else ''}" if count else "all well"
    console.print(f"{verdict}: {checked}")


def show_statistics(parts: Sequence[PartStatistics], split: SplitStatistics | str | None) -> None:
    """Prints a table of the parts, their classes, and the split."""
    console = _console()
    table = Table("", *(part.part for part in parts), box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, cells in _rows(parts):
        table.add_row(name, *cells)
    console.print(table)
    for part in parts:
        for line in _class_lines(part):
            console.print(line)
    if isinstance(split, SplitStatistics):
        sizes = ", ".join(f"{count:,} {name}" for name, count in split.sizes.items())
        lacking = f"; {split.without_heldout} classes have no held-out image" if split.without_heldout else ""
        console.print(f"split by default: {sizes}{lacking}")
    elif split is not None:
        console.print(f"no split by default: {split}")


def statistics_values(parts: Sequence[PartStatistics], split: SplitStatistics | str | None) -> dict[str, Any]:
    return {
        "parts": [asdict(part) for part in parts],
        "split": asdict(split) if isinstance(split, SplitStatistics) else None,
        "no_split": split if isinstance(split, str) else None,
    }


def _console() -> Console:
    console = Console(highlight=False, markup=False)
    return console if console.is_terminal else Console(highlight=False, markup=False, width=_WIDE)


def _rows(parts: Sequence[PartStatistics]) -> list[tuple[str, list[str]]]:
    def spread(values: Spread | None, form: Any) -> str:
        return "" if values is None else " / ".join(map(form, (values.least, values.median, values.most)))

    def row(name: str, cell: Any) -> tuple[str, list[str]]:
        return name, [cell(part) for part in parts]

    def number(value: float) -> str:
        return f"{value:,.0f}"

    return [
        row("samples", lambda part: number(part.samples)),
        row("labelled", lambda part: number(part.labelled)),
        row("unlabelled", lambda part: number(part.samples - part.labelled)),
        row("classes", lambda part: number(sum(count > 0 for count in part.classes.values()))),
        row("shards", lambda part: number(part.shards)),
        row("size", lambda part: show_bytes(part.num_bytes)),
        row("image size, least / median / most", lambda part: spread(part.image_bytes, show_bytes)),
        row("images looked into", lambda part: number(part.sampled)),
        row("width", lambda part: spread(part.width, number)),
        row("height", lambda part: spread(part.height, number)),
        row("formats", lambda part: ", ".join(f"{n:,} {kind}" for kind, n in part.kinds.items())),
    ]


def _class_lines(part: PartStatistics) -> list[str]:
    if not part.classes:
        return []
    ordered = sorted(part.classes.items(), key=lambda item: -item[1])
    if len(ordered) <= 2 * FEW:
        return [f"{part.part} by class — {_counts(dict(ordered))}"]
    return [
        f"{part.part}, largest classes — {_counts(dict(ordered[:FEW]))}",
        f"{part.part}, smallest classes — {_counts(dict(ordered[-FEW:]))}",
    ]


def _counts(classes: Mapping[str, int]) -> str:
    return ", ".join(f"{name}: {count:,}" for name, count in classes.items())
