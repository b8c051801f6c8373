"""What happens to a ratio that a benchmark found: judged, shown, written. Nothing is timed here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import benchmarks.conftest  # noqa: F401  # before pytester: what it imports would be imported twice
from benchmarks.ratios import DEFAULT_TOLERANCE, Mode, Ratios

pytest_plugins = ["pytester"]

MACHINE = "some processor, 2 threads"
ENTRIES = {
    "kernels/fast/eager": {"ratio": 2.0, "tolerance": 0.25, "baseline": "eager", "machine": MACHINE},
    "step/other/eager": {"ratio": 1.1, "tolerance": 0.1, "baseline": "eager", "machine": "elsewhere"},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "ratios.json"
    path.write_text(json.dumps({"cpu": ENTRIES}))
    return path


def _ratios(path: Path, value: float, name: str = "kernels/fast/eager", **settings: Any) -> Ratios:
    mode: Mode = settings.pop("mode", "judge")
    ratios = Ratios(path, "cpu", MACHINE, mode)
    ratios.check(name, value, "eager", **settings)
    return ratios


@pytest.mark.parametrize(("value", "state"), [(2.0, "ok"), (1.5, "ok"), (9.0, "ok"), (1.49, "SHORT")])
def test_a_ratio_may_miss_its_tolerance_and_no_more(path: Path, value: float, state: str) -> None:
    ratios = _ratios(path, value)
    assert [row[""] for row in ratios.rows()] == [state]
    assert len(ratios.problems()) == (state == "SHORT")


def test_a_short_ratio_says_what_was_due(path: Path) -> None:
    (problem,) = _ratios(path, 1.2).problems()
    assert problem == (
        "SHORT: kernels/fast/eager: 1.2 times as fast as eager, at least 1.5 was due (expected 2 within 25%)"
    )


def test_a_requirement_holds_whatever_is_expected(path: Path) -> None:
    assert _ratios(path, 1.7, at_least=1.6).problems() == []
    for mode in ("judge", "update"):
        (problem,) = _ratios(path, 1.7, at_least=1.8, mode=mode).problems()
        assert problem.endswith("at least 1.8 was due (required everywhere)")


def test_a_ratio_without_entry_fails_and_says_how_to_add_it(path: Path) -> None:
    ratios = _ratios(path, 3.0, name="kernels/new/eager")
    assert [row[""] for row in ratios.rows()] == ["missing"]
    (problem,) = ratios.problems()
    assert "kernels/new/eager" in problem
    assert "--update-ratios" in problem
    # The other kind of device has entries of its own.
    other = Ratios(path, "cuda", MACHINE)
    other.check("kernels/fast/eager", 3.0, "eager")
    assert len(other.problems()) == 1


def test_a_smoke_run_judges_nothing(path: Path) -> None:
    assert _ratios(path, 0.1, at_least=1.0, mode="smoke").problems() == []
    assert _ratios(path, 0.1, name="kernels/new/eager", mode="smoke").problems() == []


def test_an_update_writes_what_was_found_and_keeps_the_rest(path: Path) -> None:
    ratios = Ratios(path, "cpu", "new machine", "update")
    ratios.check("kernels/fast/eager", 1.23456, "eager PyTorch")
    ratios.check("kernels/new/eager", 3.0, "eager")
    assert ratios.problems() == []
    ratios.write()
    assert json.loads(path.read_text())["cpu"] == {
        "kernels/fast/eager": {
            "ratio": 1.23, "tolerance": 0.25, "baseline": "eager PyTorch", "machine": "new machine",
        },
        "kernels/new/eager": {
            "ratio": 3.0, "tolerance": DEFAULT_TOLERANCE, "baseline": "eager", "machine": "new machine",
        },
        "step/other/eager": ENTRIES["step/other/eager"],
    }  # fmt: skip
    assert _ratios(path, 1.23, name="kernels/fast/eager").problems() == []


def test_an_update_starts_a_file(tmp_path: Path) -> None:
    ratios = _ratios(tmp_path / "new.json", 2.0, mode="update")
    ratios.write()
    assert _ratios(tmp_path / "new.json", 2.0).problems() == []


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_what_is_no_ratio_is_refused(path: Path, value: float) -> None:
    with pytest.raises(ValueError, match="no ratio of times"):
        _ratios(path, value)


def test_a_name_is_used_once(path: Path) -> None:
    ratios = _ratios(path, 2.0)
    with pytest.raises(ValueError, match="twice"):
        ratios.check("kernels/fast/eager", 2.0, "eager")


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        '{"cpu": {"a/b": {"ratio": 1.0}}}',
        '{"cpu": {"a/b": {"ratio": -1, "tolerance": 0.1, "baseline": "", "machine": ""}}}',
        '{"cpu": {"a/b": {"ratio": 1, "tolerance": 1.5, "baseline": "", "machine": ""}}}',
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "damaged.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"damaged\.json: not a file of ratios"):
        Ratios(path, "cpu", MACHINE)


@pytest.fixture
def session(pytester: pytest.Pytester, path: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A benchmark of two functions of known speed."""
    # In a test process of pytest-xdist, pytest-benchmark would time nothing.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    pytester.makeconftest("from benchmarks.conftest import *")
    pytester.makepyfile(
        test_two="""
        def test_fast(ratios):
            ratios.check("kernels/fast/eager", 1.9, "eager")

        def test_slow(ratios):
            ratios.check("step/other/eager", 0.5, "eager")
            ratios.check("step/new/eager", 1.0, "eager")
        """
    )
    return pytester


def _run(session: pytest.Pytester, path: Path, *options: str) -> pytest.RunResult:
    # The folder, as in ``pytest benchmarks/``: its conftest.py holds the options.
    return session.runpytest_inprocess(session.path, "--ratios", path, *options)


def test_a_session_fails_with_a_table(session: pytest.Pytester, path: Path) -> None:
    result = _run(session, path)
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    result.assert_outcomes(passed=1, failed=1)
    result.stdout.fnmatch_lines(
        [
            "*ratios*",
            "*kernels/fast/eager*2*1.9*25%*1.5*ok*",
            "*step/other/eager*1.1*0.5*10%*0.99*SHORT*",
            "*step/new/eager*1*missing*",
            "SHORT: step/other/eager*",
            "missing: step/new/eager*--update-ratios*",
            "measured here: *elsewhere*",
        ]
    )


def test_a_session_updates_the_file(session: pytest.Pytester, path: Path) -> None:
    result = _run(session, path, "--update-ratios")
    result.assert_outcomes(passed=2)
    result.stdout.fnmatch_lines(["wrote 3 ratios to *"])
    assert _run(session, path).ret == pytest.ExitCode.OK


def test_a_smoke_session_judges_nothing_and_updates_nothing(session: pytest.Pytester, path: Path) -> None:
    before = path.read_text()
    _run(session, path, "--iterations", "1").assert_outcomes(passed=2)
    refused = _run(session, path, "--iterations", "1", "--update-ratios")
    assert refused.ret == pytest.ExitCode.USAGE_ERROR
    assert path.read_text() == before


@pytest.mark.parametrize("to_file", [True, False])
def test_a_session_speaks_to_machines(session: pytest.Pytester, path: Path, to_file: bool) -> None:
    result = _run(session, path, "--json", "out.json" if to_file else "-")
    text = (session.path / "out.json").read_text() if to_file else result.outlines[-1]
    written = json.loads(text)
    assert {"date", "command", "git", "machine", "versions", "mode"} <= set(written)
    states = {row["name"]: (row["ratio"], row["expected"], row["state"]) for row in written["ratios"]}
    assert states == {
        "kernels/fast/eager": (1.9, 2.0, "ok"),
        "step/other/eager": (0.5, 1.1, "SHORT"),
        "step/new/eager": (1.0, None, "missing"),
    }


def test_a_comparison_takes_turns_and_checks_its_ratios(session: pytest.Pytester, path: Path) -> None:
    session.makepyfile(
        test_two="""
        from benchmarks.comparison import OURS

        def test_turns(compare, ratios, benchmark):
            turns = []
            compared = compare(
                "kernels/fast",
                lambda: turns.append("ours"),
                {"eager": lambda: turns.append("eager")},
                at_least={"eager": 1e-9},
                rounds=3,
                warm_up=2,
                before={OURS: lambda: turns.append("before ours")},
            )
            assert turns == ["eager", "before ours", "ours"] * 5
            assert [len(seconds) for seconds in compared.seconds.values()] == [3, 3]
            assert compared.seconds[OURS] == benchmark.stats.stats.data
            (found,) = ratios.found
            assert found.name == "kernels/fast/eager"
            assert found.value == compared.ratios["eager"] == benchmark.extra_info["eager / ours"]
        """
    )
    result = _run(session, path, "--update-ratios", "--benchmark-json", "benchmark.json")
    result.assert_outcomes(passed=1)
    (timed,) = json.loads((session.path / "benchmark.json").read_text())["benchmarks"]
    assert timed["group"] == "kernels"
    assert timed["stats"]["rounds"] == 3
    assert list(timed["extra_info"]) == ["eager / ours"]


def test_a_comparison_without_timing_still_runs(session: pytest.Pytester, path: Path) -> None:
    session.makepyfile(
        test_two="""
        def test_rounds(compare):
            turns = []
            compare("a", lambda: turns.append(0), {"b": lambda: turns.append(1)}, rounds=15, warm_up=3)
            assert turns == [0, 1] * 3
        """
    )
    _run(session, path, "--benchmark-disable", "--iterations", "2").assert_outcomes(passed=1)
