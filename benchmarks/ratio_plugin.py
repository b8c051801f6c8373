"""The ratios of a pytest session: judged as each benchmark ends, shown and written at the end."""

from __future__ import annotations

import io
import json
from collections.abc import Generator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.environment import ROOT
from benchmarks.ratios import Mode, Ratios
from benchmarks.report import markdown

RATIOS = ROOT / "benchmarks" / "ratios.json"


def add_options(group: pytest.OptionGroup) -> None:
    group.addoption(
        "--ratios", type=Path, metavar="FILE", default=RATIOS, help="ratios to hold the benchmarks to"
    )
    group.addoption("--update-ratios", action="store_true", help="write the ratios found to that file")
    group.addoption(
        "--json",
        metavar="FILE",
        help="write the ratios found, with machine and commit; - for the last line of standard output",
    )


class RatioPlugin:
    """Holds the session's ratios.

    Args:
        smoke: whether figures mean nothing.
        surroundings: see ``benchmarks.environment``.

    Raises:
        pytest.UsageError: options contradict each other, or the file cannot be read.
    """

    def __init__(self, config: pytest.Config, smoke: bool, surroundings: Mapping[str, Any]) -> None:
        update = config.getoption("update_ratios")
        if update and smoke:
            raise pytest.UsageError("--update-ratios: not in a smoke run, whose figures mean nothing")
        mode: Mode = "update" if update else "smoke" if smoke else "judge"
        machine = surroundings["machine"]
        words = f"{machine['cpu']}, threads: {machine['threads']}"
        try:
            self.ratios = Ratios(config.getoption("ratios"), machine["device"], words, mode)
        except ValueError as error:
            raise pytest.UsageError(str(error)) from None
        self._surroundings = surroundings
        self._config = config
        self._json = config.getoption("json")

    @pytest.hookimpl(wrapper=True)
    def pytest_pyfunc_call(self) -> Generator[None, object, object]:
        """Fails a benchmark at its end, when all of its ratios are noted, if one of them will not do."""
        before = len(self.ratios.found)
        result = yield
        problems = [self.ratios.problem(found) for found in self.ratios.found[before:]]
        if any(problems):
            pytest.fail("\n".join(filter(None, problems)), pytrace=False)
        return result

    def pytest_sessionfinish(self) -> None:
        if self.ratios.found and self.ratios.mode == "update":
            self.ratios.write()
        if self._json not in (None, "-"):
            Path(self._json).write_text(json.dumps(self._record(), indent=2) + "\n")

    @pytest.hookimpl(trylast=True)  # the last thing to read, after the tables of times
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        ratios = self.ratios
        if not ratios.found:
            return
        terminalreporter.section("ratios: time of a baseline / our time, more is better")
        text = io.StringIO()
        Console(file=text, width=200, color_system=None).print(markdown(ratios.rows()))
        terminalreporter.write_line(text.getvalue().rstrip())
        for problem in ratios.problems():
            terminalreporter.write_line(problem, red=True)
        elsewhere = {found.expected.machine for found in ratios.found if found.expected} - {ratios.machine}
        if elsewhere:
            terminalreporter.write_line(
                f"measured here: {ratios.machine}; expected from: {'; '.join(sorted(elsewhere))}"
            )
        if ratios.mode == "update":
            terminalreporter.write_line(f"wrote {len(ratios.found)} ratios to {ratios.path}")

    def pytest_unconfigure(self) -> None:
        # After everything that pytest prints, so that it is the last line.
        if self._json == "-":
            self._config.get_terminal_writer().line(json.dumps(self._record()))

    def _record(self) -> dict[str, Any]:
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": " ".join(["pytest", *self._config.invocation_params.args]),
            **self._surroundings,
            "mode": self.ratios.mode,
            "ratios": self.ratios.record(),
        }
