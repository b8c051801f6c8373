"""What a table of the page is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Value:
    """A cell.

    Attributes:
        key: that the table is sorted by; None sorts last.
        change: against the baseline.
    """

    text: str
    key: float | str | None = None
    best: bool = False
    change: str = ""


@dataclass(frozen=True)
class Row:
    """A row, and the number of the run that it is about, if it is one."""

    cells: list[Value]
    run: int | None = None


@dataclass(frozen=True)
class Table:
    """A table; its first column names the rows."""

    title: str
    columns: list[str]
    rows: list[Row]
    note: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Of each column, whether it holds numbers."""
        columns = zip(*(row.cells for row in self.rows), strict=True)
        return [any(isinstance(cell.key, int | float) for cell in column) for column in columns]
