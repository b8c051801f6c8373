"""What the parsers of all commands share, and the exit codes."""

from __future__ import annotations

import argparse
from typing import NoReturn

from mlomae.errors import UserError

EXIT_OK = 0
EXIT_PROBLEMS = 1  # a check has found something
EXIT_USER_ERROR = 2
EXIT_PREEMPTED = 75  # asked to stop by a signal: the checkpoint is written, the same command goes on
EXIT_LOST = 76  # another rank was lost or is stuck: the same command resumes from the last checkpoint
EXIT_INTERRUPTED = 130


class Parser(argparse.ArgumentParser):
    """Reports misuse as one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def positive(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a whole number above 0")
    return int(text)
