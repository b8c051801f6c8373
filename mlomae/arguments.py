"""What the parsers of all commands share, and the exit codes; imports nothing heavy."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from mlomae.errors import UserError

EXIT_OK = 0
EXIT_PROBLEMS = 1
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75
EXIT_LOST = 76
EXIT_INTERRUPTED = 130
EXIT_UNREAD = 141  # as if by SIGPIPE
EXIT_CODES = {
    EXIT_OK: "done",
    EXIT_PROBLEMS: "a check has found something",
    EXIT_USER_ERROR: "bad input, named in one line",
    EXIT_PREEMPTED: "asked to stop by a signal: the checkpoint is written, the same command goes on",
    EXIT_LOST: "another rank was lost or is stuck: the same command resumes from the last checkpoint",
    EXIT_INTERRUPTED: "interrupted from the keyboard",
    EXIT_UNREAD: "what reads the output has gone, as with `| head`",
}


class HelpShown(SystemExit):
    """How a command ends that was asked for its help.

    Attributes:
        parser: what reads its arguments.
    """

    def __init__(self, parser: Parser) -> None:
        super().__init__(EXIT_OK)
        self.parser = parser


class Parser(argparse.ArgumentParser):
    """Reports misuse as one line, without the usage text, and names what may have been meant.

    Args:
        examples: whole command lines, shown at the end of the help.
    """

    def __init__(self, *args: Any, examples: Sequence[str] = (), **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **options})
        self._examples = examples

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    def format_help(self) -> str:
        examples = "".join(["\nexamples:\n", *(f"  {line}\n" for line in self._examples)])
        return super().format_help() + (examples if self._examples else "")

    def print_help(self, file: Any = None) -> None:
        super().print_help(file)
        raise HelpShown(self)

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            chosen = self.subparsers.get(getattr(known, "command", None) or "")
            near = nearest(rest[0].partition("=")[0], [*self.flags, *(chosen.flags if chosen else ())])
            message = f"unrecognized arguments: {' '.join(rest)}"
            if near is None:
                self.error(message)
            raise UserError(f"{message}; did you mean {near!r}?")
        return known

    @property
    def subparsers(self) -> dict[str, Parser]:
        """Parsers of its own commands by name."""
        found = (action for action in self.actions if isinstance(action, argparse._SubParsersAction))
        return next((dict(action.choices) for action in found), {})

    @property
    def actions(self) -> list[argparse.Action]:
        """Its options and operands, but those that its help hides."""
        return [action for action in self._actions if action.help != argparse.SUPPRESS]

    @property
    def flags(self) -> list[str]:
        """All names of its options."""
        return [flag for action in self.actions for flag in action.option_strings]

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            name = "/".join(action.option_strings) or action.metavar or action.dest
            hint = did_you_mean(str(value), map(str, action.choices))
            raise UserError(f"argument {name}: invalid choice: {value!r}; {hint}")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The second half of an error about an unknown name: the nearest one, or all that there are."""
    names = list(known)
    near = nearest(word, names)
    return f"known: {', '.join(names)}" if near is None else f"did you mean {near!r}?"


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number above 0")
    return int(text)


def nearest(word: str, names: Sequence[str]) -> str | None:
    """The name that resembles a word most; None where none does."""
    from difflib import get_close_matches  # at misuse only

    return next(iter(get_close_matches(word, names, n=1)), None)
