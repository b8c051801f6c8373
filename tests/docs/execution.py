"""Executes documented commands by their rules; those of a page share a folder, as those of a reader do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from contextlib import chdir
from importlib.util import find_spec
from pathlib import Path

import pytest

from mlomae.arguments import EXIT_OK
from tests.docs.commands import Block, Command
from tests.docs.rules import Parsed, Scaled, concrete, rule_of
from tests.docs.stock import Stock
from tests.docs.workplace import Workplace

# Where commands and blocks of Python write, and the other runs and pictures in them, which they read.
_WRITTEN = re.compile(r"""(--(run-dir|work-dir|out|plot) |"run_dir": ")\S+""")
_READ = re.compile(r"\bruns/[\w*-]+|\b[\w/-]+\.(png|jpg)")


class Execution:
    """Executes commands.

    Args:
        folder: receives the folders of the pages.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._places: dict[str, Workplace] = {}
        self.stock = Stock(self.place("stock"))

    def place(self, page: str) -> Workplace:
        """Where the commands of a page run."""
        if page not in self._places:
            self._places[page] = Workplace(self._folder / page.replace("/", "-"))
        return self._places[page]

    def __call__(self, command: Command) -> None:
        """Executes a command by its rule.

        Raises:
            AssertionError: it has no rule, or does not end as it should.
        """
        rule = rule_of(command)
        if rule.needs is not None and find_spec(rule.needs) is None:
            pytest.skip(f"needs the package {rule.needs}")
        text, place = concrete(command, rule), self.place(command.block.page)
        self.provide(text, rule.given, place.folder)
        if isinstance(rule, Parsed):
            words = place.words(text)
            with chdir(place.folder):
                try:
                    rule.parse(words)
                except (Exception, SystemExit) as error:
                    raise AssertionError(f"{command.place}: {text}\n{error}") from error
            return
        if isinstance(rule, Scaled):
            text = f"{text} {rule.more}"
        self.run(command.block.page, command.line, text, rule.codes)

    def run(self, page: str, line: int, text: str, codes: tuple[int, ...] = (EXIT_OK,)) -> str:
        """Runs ``text``, which stands for what a page shows at a line; returns its standard output."""
        ended = self.place(page).run(text)
        printed = f"{ended.out[-4000:]}\n{ended.err[-8000:]}"
        assert ended.code in codes and "Traceback (most recent" not in ended.err, (
            f"{page}:{line}: {text}\nended with {ended.code}:\n{printed}"
        )
        return ended.out

    def script(self, block: Block) -> str:
        """Runs a block of Python, after the other blocks of its page; returns its standard output."""
        folder = self.place(block.page).folder
        self.provide(block.text, {}, folder)
        (folder / "block.py").write_text(block.text)
        return self.run(block.page, block.line, "python block.py")

    def provide(self, text: str, given: Mapping[str, str], folder: Path) -> None:
        """Puts what a command reads where it reads it, unless an earlier command has left it there."""
        for path, name in given.items():
            self.stock.give(name, folder / path)
        for found in _READ.finditer(_WRITTEN.sub("", text)):
            path = found[0].replace("*", "0")
            run = "digits-run" if "digits" in path else "colour-run"
            self.stock.give("picture" if found[1] else run, folder / path)
