"""``mlomae doctor`` as its users see it."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlomae.cli import main
from mlomae.doctor.checks import Check, Finding, absent, ok
from tests.architecture.source_tree import ROOT

COLOR = re.compile(r"\x1b\[[\d;]*m")


def broken() -> Finding:
    raise RuntimeError("no such luck")


CHECKS = [
    Check("devices", "one", lambda: ok("[bold]fine[/bold]"), "none"),
    Check("devices", "two", broken, "try again"),
    Check("storage", "three", lambda: absent("not here"), "none"),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def some_checks(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    """The checks that the command carries out in a test."""
    checks = list(CHECKS)
    monkeypatch.setattr("mlomae.doctor.command.all_checks", lambda folder: checks)
    return checks


def on_terminal(monkeypatch: pytest.MonkeyPatch, **environment: str) -> str:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm-256color", "COLUMNS": "80", **environment}.items():
        monkeypatch.setenv(name, value)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    assert main(["doctor"]) == 1
    return terminal.getvalue()


def test_plain_lines_where_nobody_looks(some_checks: list[Check], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 1

    assert capsys.readouterr() == (
        "ok       devices, one: [bold]fine[/bold]\n"
        "problem  devices, two: RuntimeError: no such luck\n"
        "         fix: try again\n"
        "absent   storage, three: not here\n"
        "1 ok, 1 problem, 1 absent\n",
        "",
    )


def test_nothing_wrong_is_exit_code_0(some_checks: list[Check], capsys: pytest.CaptureFixture[str]) -> None:
    del some_checks[1]

    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.endswith("\n1 ok, 0 problem, 1 absent\n")


def test_json_is_a_list_of_objects(some_checks: list[Check], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 1

    printed = capsys.readouterr()
    assert printed.err == ""
    assert json.loads(printed.out)[1] == {
        "group": "devices",
        "name": "two",
        "status": "problem",
        "found": "RuntimeError: no such luck",
        "fix": "try again",
    }


def test_a_terminal_gets_a_table_in_colour(some_checks: list[Check], monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_terminal(monkeypatch)

    assert "\x1b[32mok" in text
    plain = COLOR.sub("", text).splitlines()
    assert [line.split() for line in plain[1:]] == [
        ["devices"],
        ["ok", "one", "[bold]fine[/bold]"],
        ["problem", "two", "RuntimeError:", "no", "such", "luck"],
        ["fix:", "try", "again"],
        ["storage"],
        ["absent", "three", "not", "here"],
        ["1", "ok,", "1", "problem,", "1", "absent"],
    ]


def test_no_color_leaves_colours_out(some_checks: list[Check], monkeypatch: pytest.MonkeyPatch) -> None:
    text = on_terminal(monkeypatch, NO_COLOR="1")

    codes = {code for found in re.findall(r"\x1b\[([\d;]*)m", text) for code in found.split(";")}
    assert codes <= {"", "0", "1", "2"}  # bold and dim are no colours
    assert "RuntimeError: no such luck" in text


def test_misuse_costs_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()

    assert main(["doctor", "--dir", str(tmp_path / "file")]) == 2
    line = f"mlomae: error: --dir {tmp_path / 'file'}: is a file; give the folder of the runs\n"
    assert capsys.readouterr() == ("", line)


@pytest.mark.dist
def test_this_machine(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlomae", "doctor", "--json", "--dir", tmp_path / "runs"],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip

    results = json.loads(done.stdout)
    problems = [entry for entry in results if entry["status"] == "problem"]
    assert done.returncode == (1 if problems else 0)
    groups = ["software", "devices", "operators", "processes", "storage"]
    assert list(dict.fromkeys(entry["group"] for entry in results)) == groups
    # What the tests need anyway has to be right; disks and limits are those of the machine.
    assert [entry for entry in problems if entry["group"] in ("operators", "processes")] == []
    assert all((entry["fix"] is None) == (entry["status"] != "problem") for entry in results)
    assert list(tmp_path.iterdir()) == []
