"""Reads the blocks of the documents: shell blocks as single commands, Python blocks as they are."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TypeVar

from tests.architecture.source_tree import ROOT

SHELLS = ("bash", "sh", "shell", "console")
_FENCE = re.compile(r"(?P<indent>\s*)(?P<ticks>`{3,})(?P<language>[\w-]*)[^`]*")
_QUOTED = r"'[^']*'|\"[^\"]*\""
# Of a file that nobody reads as a page, and folders that belong to tools.
_NO_PAGES = ("CHANGELOG.md",)
_FOLDERS = ("docs", "benchmarks", "ds_configs", "recipes", "slurm", "kernels", "examples")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: relative to the root.
        line: of its first line, counted from 1.
    """

    page: str
    line: int
    language: str
    text: str


@dataclass(frozen=True)
class Command:
    """One command of a shell block, without comments, on one line unless it is a loop.

    Attributes:
        line: of the page, counted from 1.
    """

    block: Block
    line: int
    text: str

    @property
    def place(self) -> str:
        return f"{self.block.page}:{self.line}"


Shown = TypeVar("Shown", Block, Command)


def pages() -> list[str]:
    """The documents, relative to the root."""
    found = [*ROOT.glob("*.md"), *(path for folder in _FOLDERS for path in (ROOT / folder).rglob("*.md"))]
    names = (path.relative_to(ROOT).as_posix() for path in found)
    return sorted(name for name in names if name not in _NO_PAGES)


@cache
def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page in their order; those in a list or a tab without their indentation."""
    found: list[Block] = []
    fence: re.Match[str] | None = None
    first, lines = 0, list[str]()
    for number, line in enumerate((ROOT / page).read_text().splitlines(), start=1):
        if fence is None:
            if fence := _FENCE.fullmatch(line):
                first, lines = number + 1, []
        elif line.strip() == fence["ticks"]:
            found.append(Block(page, first, fence["language"], "\n".join(lines) + "\n"))
            fence = None
        else:
            lines.append(line.removeprefix(fence["indent"]))
    assert fence is None, f"{page}:{first - 1}: this block is never closed"
    return found


def commands(page: str) -> list[Command]:
    """The commands of a page in their order."""
    return [command for block in blocks(page) if block.language in SHELLS for command in _split(block)]


def python_blocks() -> list[Block]:
    return [block for page in pages() for block in blocks(page) if block.language == "python"]


def different(found: Iterable[Shown]) -> list[Shown]:
    """Without those that an earlier page has shown."""
    first: dict[str, Shown] = {}
    for one in found:
        first.setdefault(one.text, one)
    return list(first.values())


def _split(block: Block) -> Iterator[Command]:
    """The commands of a block; what ``&&`` joins are several."""
    waiting, first = "", 0
    for number, line in enumerate(block.text.splitlines(), start=block.line):
        if block.language == "console":
            if not line.startswith("$ "):
                continue
            line = line.removeprefix("$ ")
        line = line[: _start_of_comment(line)].rstrip()
        first = first if waiting else number
        waiting += line.removesuffix("\\")
        if line.endswith(("\\", "&&")):
            waiting = waiting.rstrip() + " "
        elif waiting.strip() and _is_complete(waiting):
            yield from _joined(block, first, waiting)
            waiting = ""
        elif waiting.strip():
            waiting += "\n"
    assert not waiting.strip(), f"{block.page}:{first}: bash waits for more of this command: {waiting}"


def _joined(block: Block, line: int, text: str) -> Iterator[Command]:
    # Within a loop or a bracket && joins what belongs together.
    if "\n" in text or text.startswith(("for ", "while ", "if ", "(")):
        yield Command(block, line, text)
        return
    start = 0
    for found in re.finditer(r"&&|$", _masked(text)):
        yield Command(block, line, _tidy(text[start : found.start()]))
        start = found.end()


def _tidy(text: str) -> str:
    """The text with single spaces, but in quotes."""
    pieces = re.split(f"({_QUOTED})", text.strip())
    return "".join(piece if number % 2 else re.sub(" +", " ", piece) for number, piece in enumerate(pieces))


def _masked(text: str) -> str:
    """The text with everything in quotes replaced by as many letters."""
    return re.sub(_QUOTED, lambda quoted: "q" * len(quoted[0]), text)


def _start_of_comment(line: str) -> int:
    found = re.search(r"(^|\s)#", _masked(line))
    return len(line) if found is None else found.start()


def _is_complete(text: str) -> bool:
    """Whether bash would run this and not wait for another line."""
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    return checked.returncode == 0 and "here-document" not in checked.stderr


def shown_elsewhere(programs: tuple[str, ...]) -> list[str]:
    """Places of lines that begin like a command in a block which is not one of a shell."""
    return [
        f"{page}:{number}: {line}"
        for page in pages()
        for block in blocks(page)
        if block.language not in SHELLS
        for number, line in enumerate(block.text.splitlines(), start=block.line)
        if line.startswith(tuple(f"{program} " for program in programs))
    ]
