"""JSON as a run leaves it: whole files, and files of one object a line to which a living run adds."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlomae.errors import UserError


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no file.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    content = _content(path)
    return None if content is None else _parse(content, str(path))


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each line's place, for messages, and object; nothing where there is no file.

    A last line without its end is left out where it cannot be read: it is being written, or a killed process
    left it.

    Raises:
        UserError: the file cannot be read, or another line is damaged.
    """
    *lines, rest = (_content(path) or b"").split(b"\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            place = f"{path}: line {number}"
            yield place, _parse(line, place)
    if rest:
        try:
            last = _parse(rest, str(path))
        except UserError:
            return
        yield f"{path}: line {len(lines) + 1}", last


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _parse(text: bytes, place: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{place} is damaged: found {_start(text)}, expected a JSON object") from None
    if not isinstance(value, dict):
        raise UserError(f"{place}: found {_start(text)}, expected a JSON object")
    return value


def _start(text: bytes) -> str:
    return repr(text[:40].decode(errors="replace"))
