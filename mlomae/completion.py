"""``mlomae completion SHELL``: a script with which a shell completes commands, flags and their values.

Written here, not by shtab: most flags are fields of configurations, which no argparse parser knows, and it
does not write for fish.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path

from mlomae.arguments import EXIT_OK, HelpShown, Parser
from mlomae.cli import COMMANDS, run
from mlomae.completion_scripts import FILE, FOLDER, RECIPE, WRITERS, Context, Option
from mlomae.config import Config
from mlomae.config_arguments import Flag, flags
from mlomae.recipes import recipes
from mlomae.sections import Location, Section

# Commands that take the fields of a run as flags; eval takes those of its task.
_TAKE_FIELDS = ("train", "profile", "hypergrad-check", "plan", "submit")
# Of operands and values, by the names that help gives them; other operands are files.
_KINDS = {"RUN": FOLDER, "DIR": FOLDER, "OUT": FOLDER, "RECIPE": RECIPE, "FILE": FILE}


def main(words: Sequence[str]) -> int:
    """Prints the script; returns the exit code."""
    known = _parser().parse_args(words)
    print(WRITERS[known.shell](contexts(), recipes()), end="")
    return EXIT_OK


def contexts() -> list[Context]:
    """What may follow each command, as its own parser tells it."""
    summaries = {name: command.summary for name, command in COMMANDS.items()}
    found = [Context("", summaries, tuple(_options(_parser_of())))]
    for name in COMMANDS:
        found += _of_command(name)
    return found


def _of_command(name: str) -> Iterator[Context]:
    parser = _parser_of(name)
    options = tuple(_options(parser))
    if name == "eval":
        tasks = next(action.choices for action in parser.actions if action.dest == "task")
        yield Context(name, dict.fromkeys(tasks or (), "task"), options)
        for task in tasks or ():
            root = import_module(f"mlomae.downstream.{task}").Config
            yield _context(f"{name} {task}", _parser_of(name, task), root)
    elif parser.subparsers:
        meanings = {word: sub.description or "" for word, sub in parser.subparsers.items()}
        yield Context(name, meanings, options)
        for word, sub in parser.subparsers.items():
            yield _context(f"{name} {word}", sub)
    else:
        yield _context(name, parser, Config if name in _TAKE_FIELDS else None)


def _context(words: str, parser: Parser, root: type[Section] | None = None) -> Context:
    fields = [] if root is None else flags(root)
    # A command's own option of the same name comes before the field.
    given = [
        Option(f"--{flag.name}", flag.description, _values_of(flag))
        for flag in fields
        if f"--{flag.name}" not in parser.flags
    ]
    return Context(words, _operands(parser), (*_options(parser), *given))


def _operands(parser: Parser) -> dict[str, str]:
    if parser.usage is not None:
        # Written by hand, since an operand is no argument of the parser: "mlomae profile RUN | …".
        found = re.match(r"mlomae [a-z-]+((?: [A-Z]+)*)", parser.usage)
        names = found[1].split() if found else []
    else:
        operands = [action for action in parser.actions if not action.option_strings]
        if operands and operands[0].choices:
            return dict.fromkeys(map(str, operands[0].choices), "")
        names = [str(action.metavar) for action in operands]
    kinds = {_KINDS.get(name, FILE) for name in names}
    return dict.fromkeys(kinds if len(kinds) < 2 else {FILE}, "")


def _parser_of(*words: str) -> Parser:
    """The parser of a command: every command parses its words first of all."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            run([*words, "--help"])
    except HelpShown as shown:
        return shown.parser
    raise AssertionError(f"{' '.join(words)}: --help is not answered by a Parser")


def _options(parser: Parser) -> Iterator[Option]:
    for action in parser.actions:
        names = [name for name in action.option_strings if name.startswith("--")]
        if names:
            yield Option(names[0], (action.help or "") % vars(action), _values(action))


def _values(action: argparse.Action) -> tuple[str, ...] | None:
    if action.nargs == 0:
        return None
    if action.choices is not None:
        return tuple(map(str, action.choices))
    if action.dest == "config":
        return (RECIPE,)
    kind = _KINDS.get(str(action.metavar), FILE if action.type is Path else None)
    return () if kind is None else (kind,)


def _values_of(flag: Flag) -> tuple[str, ...]:
    kinds = (flag.kind, *getattr(flag.kind, "__args__", ()))
    if Path in kinds:
        return (FOLDER,)
    return (FILE,) if Location in kinds else flag.choices


def _parser() -> Parser:
    parser = Parser(
        prog="mlomae completion",
        description="Prints a completion script. It knows the commands, flags, fields and recipes of this "
        "version; making it takes some seconds, so keep it in a file (docs/cli.md).",
        examples=(
            "mlomae completion bash > ~/.local/share/bash-completion/completions/mlomae",
            "mlomae completion zsh > ~/.zfunc/_mlomae",
            "mlomae completion fish > ~/.config/fish/completions/mlomae.fish",
        ),
    )
    parser.add_argument("shell", choices=list(WRITERS), metavar="bash | zsh | fish")
    return parser
