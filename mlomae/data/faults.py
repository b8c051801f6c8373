"""Samples that cannot be used: what was wrong with each, by kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from mlomae.errors import UserError

Kind = Literal[
    "unreadable",  # the file or its bytes cannot be had
    "empty",  # no bytes
    "not-an-image",  # bytes of no known format
    "damaged",  # an image that ends early or does not decode
    "too-small",  # a side below MIN_SIDE
    "too-large",  # more than MAX_PIXELS pixels
    "misplaced",  # a shard holds another sample where its index has this one
    "no-image",  # a sample without an image
    "label",  # a label that is no class number
    "duplicate",  # two members of one name
    "path",  # a name that leaves its folder
]


class BadSample(Exception):
    """A sample cannot be used; the others are not affected.

    Attributes:
        kind: for counting.
        reason: for people, in one line.
    """

    def __init__(self, kind: Kind, reason: str) -> None:
        super().__init__(kind, reason)
        self.kind = kind
        self.reason = reason


@dataclass(frozen=True)
class Fault:
    """Which sample is bad, and why."""

    key: str
    kind: Kind
    reason: str


def count_kinds(faults: Iterable[Fault]) -> str:
    """Such as "3 damaged, 1 empty"."""
    kinds = Counter(fault.kind for fault in faults)
    return ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())


class HopelessError(UserError):
    """So many samples in a row are bad that no good one is expected.

    Attributes:
        faults: of all of them.
    """

    def __init__(self, message: str, faults: tuple[Fault, ...]) -> None:
        super().__init__(message, faults)
        self.faults = faults

    def __str__(self) -> str:
        return str(self.args[0])
