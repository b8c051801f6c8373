"""One check beside others: none hides another, and each says what to do."""

from __future__ import annotations

import warnings

import pytest

from mlomae.doctor.checks import Check, Finding, Result, absent, carry_out, ok, problem


def result(finding: Finding | Exception) -> Result:
    def run() -> Finding:
        if isinstance(finding, Exception):
            raise finding
        return finding

    return carry_out(Check("group", "name", run, "the usual fix"))


def test_only_problems_come_with_a_fix() -> None:
    assert result(ok("fine")) == Result("group", "name", "ok", "fine", None)
    assert result(absent("not here")) == Result("group", "name", "absent", "not here", None)
    assert result(problem("wrong")) == Result("group", "name", "problem", "wrong", "the usual fix")
    assert result(problem("wrong", "this one")).fix == "this one"


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (RuntimeError("first line\nsecond line"), "RuntimeError: first line"),
        (ModuleNotFoundError("No module named 'torch'"), "ModuleNotFoundError: No module named 'torch'"),
        (ValueError(), "ValueError"),
    ],
)
def test_what_is_raised_is_a_problem(error: Exception, found: str) -> None:
    assert result(error) == Result("group", "name", "problem", found, "the usual fix")


def test_warnings_of_a_check_stay_unsaid(recwarn: pytest.WarningsRecorder) -> None:
    def run() -> Finding:
        warnings.warn("slow", RuntimeWarning, stacklevel=1)
        return ok("fine")

    assert carry_out(Check("group", "name", run, "")).status == "ok"
    assert not recwarn.list
