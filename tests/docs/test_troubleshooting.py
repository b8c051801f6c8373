"""The messages that docs/troubleshooting.md quotes are those of the code."""

from __future__ import annotations

import ast
import re
from functools import cache

import pytest

from tests.architecture.source_tree import parse, python_files
from tests.docs.commands import blocks

PAGE = "docs/troubleshooting.md"
# Letters between two placeholders; fewer occur anywhere.
TELLING = 10


@cache
def spoken() -> str:
    """All text of the program's strings, a line for each piece between two placeholders."""
    constants = (
        node.value
        for path in python_files("mlomae", "kernels")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    return "\n".join(constants)


def fragments(message: str) -> list[str]:
    """What is fixed in a message, without the punctuation at which the code may put it together.

    Placeholders stand between single angle quotation marks.
    """
    pieces = re.split("\u2039[^\u203a]*\u203a", message)
    return [piece.strip(" ;:,.()'=") for piece in pieces if len(piece) >= TELLING]


MESSAGES = [block.text.strip() for block in blocks(PAGE)]


def test_there_are_messages() -> None:
    assert len(MESSAGES) > 40
    assert len(set(MESSAGES)) == len(MESSAGES)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: message[:60])
def test_messages_are_those_of_the_code(message: str) -> None:
    found = fragments(message)
    assert found, "nothing in this message can be looked for: quote more of it"
    assert [piece for piece in found if piece not in spoken()] == []
