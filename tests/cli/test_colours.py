"""Colours are for terminals, and not for those who set NO_COLOR; rich decides, everywhere."""

from __future__ import annotations

import ast
import io
import re
import sys
from collections.abc import Callable

import pytest

from mlomae.cli import main
from mlomae.sharding.view import Bar
from tests.architecture.source_tree import ROOT, parse, python_files

# What a Console may be told; anything about terminals and colours it finds out itself.
ALLOWED = {"highlight", "markup", "stderr", "width"}
COLOR = re.compile(r"\x1b\[(?:[\d;]*;)?(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])(?:;[\d;]*)?m")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def plan() -> None:
    assert main(["plan", "--config", "digits", "--gpus", "1,2"]) == 0


def bar() -> None:
    with Bar("images") as shown:
        shown.update(5, 10, "some text")
    print("done")


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What a function prints on a stream with some environment."""

    def run(show: Callable[[], None], stream: io.StringIO, **environment: str) -> str:
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in {"TERM": "xterm-256color", "COLUMNS": "100", **environment}.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "stdout", stream)
        show()
        return stream.getvalue()

    return run


@pytest.mark.parametrize("show", [plan, bar])
def test_a_pipe_gets_no_escape_code(show: Callable[[], None], printed: Callable[..., str]) -> None:
    text = printed(show, io.StringIO())

    assert text and "\x1b" not in text


@pytest.mark.parametrize("show", [plan, bar])
def test_no_color_is_honoured_on_a_terminal(show: Callable[[], None], printed: Callable[..., str]) -> None:
    assert COLOR.search(printed(show, Terminal(), NO_COLOR="1")) is None


def test_a_terminal_gets_a_bar_in_colour(printed: Callable[..., str]) -> None:
    text = printed(bar, Terminal())

    assert COLOR.search(text) and "some text" in text


def test_a_dumb_terminal_gets_no_bar(printed: Callable[..., str]) -> None:
    assert printed(bar, Terminal(), TERM="dumb") == "done\n"


def test_no_console_is_told_about_terminals_or_colours() -> None:
    calls = [
        (path, keyword.arg)
        for path in python_files("mlomae")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Console"
        for keyword in node.keywords
    ]
    assert calls
    assert [(str(path), name) for path, name in calls if name not in ALLOWED] == []


def test_no_escape_code_is_written_by_hand() -> None:
    sources = {path: (ROOT / path).read_text() for path in python_files("mlomae")}

    assert [str(path) for path, text in sources.items() if re.search(r"\\x1b|\\033|\\e\[", text)] == []
