"""Ends of a run that need no traceback: one line, and an exit code that tells what to do."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message is one line: the field or file, what was found, what would be right.

    Names and values that it quotes may hold anything: what cannot be printed in a line is escaped.
    """

    def __init__(self, message: str, *more: object) -> None:
        if not message.isprintable():
            message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        super().__init__(message, *more)


class NotFinite(UserError):
    """A level of a run broke: its loss, its gradients or its weights are not finite."""


class Preempted(BaseException):
    """A signal asked this run to stop. What is done is saved; the same command goes on.

    It may be raised anywhere, as KeyboardInterrupt may: inside of a decoder whose errors, of any kind, are
    those of a damaged image.
    """


class Interrupted(Preempted):
    """The signal came from the keyboard."""


class LostRank(Exception):
    """Another rank was lost, left or is stuck. The message is one line that names it."""
