"""What a check is, and how one is carried out without harm to the others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "problem", "absent"]


@dataclass(frozen=True)
class Finding:
    """What a check has found.

    Attributes:
        fix: of a problem; empty for that of the check.
    """

    status: Status
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Check:
    """One question about this machine.

    Attributes:
        run: answers it; whatever it raises is a problem.
        fix: what to do about a problem.
    """

    group: str
    name: str
    run: Callable[[], Finding]
    fix: str


@dataclass(frozen=True)
class Result:
    """A line of the report; ``fix`` is None where there is nothing to do."""

    group: str
    name: str
    status: Status
    found: str
    fix: str | None


def ok(text: str) -> Finding:
    return Finding("ok", text)


def absent(text: str) -> Finding:
    """Something optional that is not here."""
    return Finding("absent", text)


def problem(text: str, fix: str = "") -> Finding:
    return Finding("problem", text, fix)


def carry_out(check: Check) -> Result:
    """The result of a check; warnings stay unsaid."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            finding = check.run()
    except Exception as error:
        finding = problem(first_line(error))
    fix = (finding.fix or check.fix) if finding.status == "problem" else None
    return Result(check.group, check.name, finding.status, finding.text, fix)


def first_line(error: Exception) -> str:
    """Kind and message of an error in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
