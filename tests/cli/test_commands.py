"""The table of commands: the overview, names that are nearly right, and what an answer may cost."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mlomae import __version__
from mlomae.arguments import EXIT_CODES, HelpShown, Parser
from mlomae.cli import COMMANDS, GROUPS, main
from tests.architecture.source_tree import ROOT

# What --help and a mistyped command must not wait for.
HEAVY = ("torch", "pydantic", "yaml", "numpy", "rich", "matplotlib")


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which a command is refused."""
    assert main(list(words)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line.removeprefix("mlomae: error: ")


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*words, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_overview_has_a_line_for_every_command_in_its_group(capsys: pytest.CaptureFixture[str]) -> None:
    text = help_of(capsys)

    for group, commands in GROUPS.items():
        section = text.partition(f"\n{group}:\n")[2].partition("\n\n")[0]
        assert [line.split()[0] for line in section.splitlines()] == list(commands)
        assert all(command.summary in section for command in commands.values())
    assert max(map(len, text.splitlines())) <= 100
    assert "\nexamples:\n  mlomae train " in text


def test_overview_and_page_name_the_exit_codes_and_commands(capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of(capsys).partition("exit codes:\n")[2].partition("\n\n")[0].splitlines()
    page = (ROOT / "docs" / "cli.md").read_text()

    assert {int(line.split()[0]) for line in shown} == set(EXIT_CODES)
    assert {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)} == set(EXIT_CODES)
    named = re.findall(r"^\| `mlomae ([a-z-]+)", page, re.MULTILINE)
    assert sorted(set(named)) == sorted(COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--version"])

    assert (stop.value.code, capsys.readouterr().out) == (0, f"{__version__}\n")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "no command given: expected a command first, such as train; see --help"),
        (("--config", "x"), "--config: expected a command first, such as train; see --help"),
        (("tarin",), "command 'tarin': unknown; did you mean 'train'?"),
        (("reprot", "runs/x"), "command 'reprot': unknown; did you mean 'report'?"),
        (("plan", "--gpu", "4"), "--gpu: unknown; did you mean '--gpus'?"),
        (("submit", "digits", "--partion", "a"), "--partion: unknown; did you mean '--partition'?"),
        (("eval", "knn", "x", "--confg", "y"), "--confg: unknown; did you mean '--config'?"),
        (("doctor", "--jsn"), "unrecognized arguments: --jsn; did you mean '--json'?"),
        (("doctor", "--xyz"), "unrecognized arguments: --xyz; see --help"),
        (("completion", "bsh"), "argument bash | zsh | fish: invalid choice: 'bsh'; did you mean 'bash'?"),
        (
            ("completion", "ksh93"),
            "argument bash | zsh | fish: invalid choice: 'ksh93'; known: bash, zsh, fish",
        ),
        (
            ("shards", "verfy", "x"),
            "argument create | index | verify | stats: invalid choice: 'verfy'; did you",
        ),
        (("shards", "verify", "x", "--quik"), "unrecognized arguments: --quik; did you mean '--quick'?"),
        (("shards", "verify", "x", "--seed", "1"), "unrecognized arguments: --seed 1; see --help"),
        (
            ("export", "x", "--to", "tim", "--out", "y"),
            "argument --to: invalid choice: 'tim'; did you mean 'timm'?",
        ),
    ],
)
def test_misuse_names_what_may_have_been_meant(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], line: str
) -> None:
    assert refusal(capsys, *words).startswith(line)


def test_an_unknown_command_without_a_near_one_lists_all(capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "runs/digits")

    assert line == f"command 'runs/digits': unknown; known: {', '.join(COMMANDS)}"


@pytest.mark.parametrize("words", [["--help"], ["reprot"], ["--version"], ["recipes"], ["doctor", "--help"]])
def test_light_answers_import_nothing_heavy(words: list[str]) -> None:
    program = (
        "import sys\nfrom mlomae.cli import main\n"
        f"try:\n    main({words})\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)

    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "program", [[ROOT / "train.py", "--local_rank=0"], ["-m", "mlomae", "--local_rank=0", "train"]]
)
def test_the_deepspeed_launcher_puts_its_flag_first(program: list[Path | str], tmp_path: Path) -> None:
    """The script trains without a command word."""
    done = subprocess.run(
        [sys.executable, *program, "--config", "digits", "--iterations", "0"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip

    message = "mlomae: error: iterations: input should be greater than 0, found 0\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", message)


def test_help_tells_which_parser_wrote_it() -> None:
    parser = Parser(prog="x", examples=("x --all",))
    with pytest.raises(HelpShown) as shown:
        parser.parse_args(["--help"])

    assert shown.value.parser is parser
    assert parser.format_help().endswith("\nexamples:\n  x --all\n")


@pytest.mark.parametrize("words", [(name,) for name in COMMANDS] + [("eval", "knn"), ("shards", "create")])
def test_every_command_shows_examples_of_itself(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    text = help_of(capsys, *words)

    assert text.startswith(f"usage: mlomae {words[0]} ")
    examples = text.partition("\nexamples:\n")[2].splitlines()
    assert examples and all(re.search(rf"\b(mlomae {words[0]}|train\.py)\b", line) for line in examples)


@pytest.mark.parametrize(("command", "resumes"), [("train", True), ("eval", True), ("doctor", False)])
def test_an_interrupted_command_promises_what_it_keeps(
    command: str, resumes: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(words: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlomae.cli.run", stop)

    assert main([command]) == 130
    line = capsys.readouterr().err
    assert line.startswith("mlomae: interrupted")
    assert ("resumes from the last checkpoint" in line) == resumes


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_output_that_nobody_reads_is_no_crash(unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    found = subprocess.run(
        [sys.executable, "-m", "mlomae", "recipes"], cwd=ROOT, timeout=60, check=False,
        stdout=writer, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
    )  # fmt: skip
    os.close(writer)
    assert (found.returncode, found.stderr) == (141, b"")


def test_another_broken_pipe_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def lose_a_connection(words: object) -> int:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("mlomae.cli.run", lose_a_connection)
    with pytest.raises(BrokenPipeError):
        main(["train"])
