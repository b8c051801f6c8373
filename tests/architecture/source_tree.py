"""What the architecture tests read: the project's Python files and what they import."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_FOLDERS = ("mlomae", "kernels", "tests", "benchmarks", "docs", "recipes")


def python_files(*folders: str) -> list[Path]:
    """Files below the folders (default: the whole project), relative to the root."""
    found = [path for folder in folders or _FOLDERS for path in (ROOT / folder).rglob("*.py")]
    if not folders:
        found += ROOT.glob("*.py")
    return sorted(path.relative_to(ROOT) for path in found)


def requirement_lines() -> list[str]:
    """What requirements.txt asks for, a line each, without its comments."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line]


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), filename=str(path))


def imported_names(path: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, also of those inside functions; ``from a import b`` is a.b."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = path.parts[: -node.level] if node.level else ()
            module = ".".join([*parents, node.module] if node.module else parents)
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def is_within(name: str, package: str) -> bool:
    """Whether a dotted name is the package or something inside it."""
    return f"{name}.".startswith(f"{package}.")
