"""The report of ``mlomae doctor``: a table on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from mlomae.doctor.checks import Check, Result, carry_out

_STYLES = {"ok": "green", "problem": "bold red", "absent": "dim"}


def watch(checks: Iterable[Check]) -> list[Result]:
    """Carries the checks out; a terminal shows which one is at work."""
    console = Console(stderr=True, highlight=False)
    if not console.is_terminal:
        return [carry_out(check) for check in checks]
    results = []
    with console.status("") as status:
        for check in checks:
            status.update(f"{check.group}: {check.name}")
            results.append(carry_out(check))
    return results


def show(results: Sequence[Result]) -> None:
    """Prints the results, each problem with what to do about it, and how many there are of each kind."""
    console = Console(highlight=False, markup=False)
    if console.is_terminal:
        console.print(_table(results))
    else:
        for result in results:
            print(f"{result.status:<8} {result.group}, {result.name}: {result.found}")
            if result.fix is not None:
                print(f"{'':<8} fix: {result.fix}")
    counts: Counter[str] = Counter(result.status for result in results)
    print(", ".join(f"{counts[status]} {status}" for status in _STYLES))


def _table(results: Sequence[Result]) -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("", "check", "found"):
        table.add_column(name, overflow="fold")
    group = ""
    for result in results:
        if result.group != group:
            group = result.group
            table.add_row("", Text(group, "bold"), "")
        found = Text(result.found)
        if result.fix is not None:
            found.append(f"\nfix: {result.fix}", "yellow")
        table.add_row(Text(result.status, _STYLES[result.status]), f"  {result.name}", found)
    return table
