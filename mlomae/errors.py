"""Errors that a user can act on: one line, no traceback, a non-zero exit."""

from __future__ import annotations


class UserError(Exception):
    """Bad input. The message is one line: the field or file, what was found, what would be right."""
