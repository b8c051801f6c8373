"""Numbers are written for people."""

from __future__ import annotations

import math

import pytest

from mlomae.report.figures import ABSENT, Kind, is_number, name_of, write


@pytest.mark.parametrize(
    ("value", "kind", "text"),
    [
        (0.12345678, Kind.NUMBER, "0.1235"),
        (-12.3456, Kind.NUMBER, "-12.35"),
        (0, Kind.NUMBER, "0"),
        (12345.6, Kind.NUMBER, "12,346"),
        (8.4333e-9, Kind.NUMBER, "8.43 x 10⁻⁹"),
        (-1.5e7, Kind.NUMBER, "-1.50 x 10⁷"),
        (0.53617, Kind.SHARE, "53.6 %"),
        (0.000213, Kind.SHARE, "0.021 %"),
        (0, Kind.SHARE, "0.0 %"),
        (459562, Kind.COUNT, "459,562"),
        (1415172096, Kind.BYTES, "1.32 GiB"),
        (1010 * 2**20, Kind.BYTES, "1010 MiB"),
        (0, Kind.BYTES, "0 B"),
        (12.34, Kind.SECONDS, "12.3 s"),
        (3435.702, Kind.SECONDS, "57 min 16 s"),
        (90061, Kind.SECONDS, "25 h 01 min"),
        (None, Kind.NUMBER, ABSENT),
        (math.inf, Kind.SHARE, ABSENT),
    ],
)  # fmt: skip
def test_numbers(value: float | None, kind: Kind, text: str) -> None:
    written = {"-": "\N{MINUS SIGN}", "x": "\N{MULTIPLICATION SIGN}", " ": "\N{NO-BREAK SPACE}"}
    assert write(value, kind) == text.translate(str.maketrans(written))


def test_digits() -> None:
    assert write(0.536171, Kind.SHARE, 2) == "53.62\N{NO-BREAK SPACE}%"
    assert write(0.0012971, digits=2) == "0.0013"


def test_names_of_figures() -> None:
    assert name_of("miou").text == "mIoU" and name_of("miou").better
    assert name_of("loss").better is False
    unknown = name_of("accuracy_k20")
    assert (unknown.text, unknown.kind, unknown.better) == ("Accuracy k20", Kind.SHARE, True)
    assert name_of("some_thing").kind is Kind.NUMBER


def test_what_is_no_number() -> None:
    assert [is_number(value) for value in (1, 0.5, True, None, "1", math.nan, [1])] == [
        True,
        True,
        *[False] * 5,
    ]
