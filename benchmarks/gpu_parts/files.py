"""JSON files that are whole at any moment, and rows as Markdown."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> None:
    """Replaces the file in one step; numbers that are not finite become null."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(
        json.dumps(_finite(content), indent=1, allow_nan=False, ensure_ascii=False, default=str) + "\n"
    )
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The content; None where there is no such file."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    return content


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows with the same keys as a Markdown table, readable as it is."""
    if not rows:
        return "(none)"
    lines = [list(rows[0]), *([text(cell) for cell in row.values()] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    rule = ["-" * width for width in widths]
    return "\n".join(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:]))


def text(cell: Any) -> str:
    """A cell in words: four digits of a figure."""
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "NO"
    if isinstance(cell, float):
        return f"{cell:,.0f}" if math.isfinite(cell) and abs(cell) >= 1000 else f"{cell:.4g}"
    return str(cell)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
