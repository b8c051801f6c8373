"""``mlomae submit``: what it hands to sbatch, and what it refuses before."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from mlomae.cli import main
from mlomae.config import dump_config
from mlomae.slurm import scripts_folder
from tests.integration.tiny import tiny_config, write_recipe

SCRIPTS = ("one_node", "many_nodes", "sweep")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "tiny.yaml", {"run_dir": str(tmp_path / "run")})


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in of sbatch, which writes its arguments and MLOMAE_PYTHON to the file ``call``."""
    program = tmp_path / "bin" / "sbatch"
    program.parent.mkdir()
    program.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"json.dump([sys.argv[1:], os.environ['MLOMAE_PYTHON']], open({str(tmp_path / 'call')!r}, 'w'))\n"
        "print('sbatch: billed to nobody', file=sys.stderr)\nprint('31;main')\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    return program


def submit(*arguments: str | Path) -> int:
    return main(["submit", *map(str, arguments)])


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert submit(*arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line.removeprefix("mlomae: error: ")


def command(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> list[str]:
    """The words of the command that --dry-run prints first."""
    assert submit(*arguments, "--dry-run") == 0
    return shlex.split(capsys.readouterr().out.splitlines()[0])


@pytest.mark.parametrize(("nodes", "script"), [("1", "one_node"), ("2", "many_nodes")])
def test_options_override_those_of_the_script(
    recipe: Path, nodes: str, script: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--nodes", nodes, "--gpus-per-node", "4", "--time", "8:00:00", "--job-name", "a b"]
    words = command(capsys, recipe, *options, "--pretrain.lr", "1e-4")
    assert words == [
        f"MLOMAE_PYTHON={sys.executable}", "sbatch", "--parsable", "--nodes", nodes, "--gpus-per-node", "4",
        "--ntasks-per-node", "4", "--time", "8:00:00", "--job-name", "a b",
        str(scripts_folder() / f"{script}.sbatch"), "--config", str(recipe), "--pretrain.lr", "1e-4",
    ]  # fmt: skip


def test_dry_run_shows_the_whole_script_and_needs_no_slurm(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert submit("--config", recipe, "--dry-run") == 0
    printed = capsys.readouterr().out
    assert (scripts_folder() / "one_node.sbatch").read_text() in printed
    assert (scripts_folder() / "run.sh").read_text() in printed


def test_submitted_job_is_named(
    recipe: Path, sbatch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit(recipe, "--seed", "3") == 0
    assert capsys.readouterr() == ("job: 31\n", "sbatch: billed to nobody\n")
    arguments, python = json.loads((tmp_path / "call").read_text())
    script = str(scripts_folder() / "one_node.sbatch")
    assert arguments == ["--parsable", "--nodes", "1", script, "--config", str(recipe), "--seed", "3"]
    # The job runs this Python, whatever stands first in the PATH of the nodes.
    assert python == sys.executable


def test_sweep_is_an_array_with_a_task_per_run(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("# rates\n--pretrain.lr 1e-3\n\n--pretrain.lr 1e-4 --pretrain.betas '[0.9, 0.99]'\n")
    words = command(capsys, recipe, "--sweep", sweep, "--seed", "1")
    assert words[words.index("--array") + 1] == "1-2"
    script = words.index(str(scripts_folder() / "sweep.sbatch"))
    shared = ["--config", str(recipe), "--seed", "1"]
    assert words[script + 1 :] == [str(sweep), str(tmp_path / "run"), *shared]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pretrain.learning_rate", "1"], "pretrain.learning_rate: unknown key"),
        (["--gpus-per-node", "3"], "pretrain.batch_size: 8 is not divisible by the 3 ranks of the job"),
        (["--nodes", "3", "--gpus-per-node", "0"], "pretrain.batch_size: 8 is not divisible by the 3 ranks"),
        (["--gpus-per-node", "4", "--mask.batch_size", "6"], "mask.batch_size: 6 is not divisible by the 4"),
        (["--gpus-per-node", "4", "--pretrain.micro_batches", "4"], "pretrain.micro_batches: 4 does not"),
        (["--gpus-per-node", "0", "--device", "cuda"], "device: found cuda with --gpus-per-node 0"),
        (["--gpus-per-node", "4", "--tasks-per-node", "2"], "--tasks-per-node: goes with --gpus-per-node 0"),
        (["--gpus-per-node", "all"], "argument --gpus-per-node: found 'all', expected a whole number"),
        (["--nodes", "0"], "argument --nodes: found '0', expected a whole number above 0"),
        (["--deepspeed_config", "absent.json"], "--deepspeed_config absent.json: cannot be read"),
        (["--sweep", "absent.txt"], "--sweep absent.txt: cannot be read (No such file or directory)"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused(
    recipe: Path, sbatch: Path, tmp_path: Path, arguments: list[str], message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert refusal(capsys, recipe, *arguments).startswith(message)
    assert not (tmp_path / "call").exists()


def test_recipe_is_given_once(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], [recipe, "--config", recipe]):
        assert refusal(capsys, *arguments).startswith("submit: give a recipe")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--seed x", "run 1: seed: "),
        ("--pretrain.batch_size 9", "run 1: pretrain.batch_size: 9 is not divisible by the 2 ranks"),
        ("--run-dir same\n--seed 1 --run-dir same", "run 2: run_dir same: another line has it too"),
        ("--seed '1", '"--seed \'1": no closing quotation'),
        ("# nothing", "holds no run"),
    ],
)
def test_error_in_a_sweep_names_its_line(
    recipe: Path, tmp_path: Path, line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text(f"{line}\n")
    found = refusal(capsys, recipe, "--sweep", sweep, "--gpus-per-node", "2")
    assert re.match(rf"--sweep {re.escape(str(sweep))}[,:] {re.escape(message)}", found), found


def test_directory_of_another_run_is_refused(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--gpus-per-node", "2"]
    run = tmp_path / "run"
    run.mkdir()
    (run / "notes.txt").touch()
    assert "not a run directory" in refusal(capsys, recipe, *options)
    (run / "config.yaml").write_text(dump_config(tiny_config({"seed": 5})))
    assert "seed is 5 there, 0 asked for" in refusal(capsys, recipe, *options)
    (run / "result.json").write_text("{}")
    assert "is complete already" in refusal(capsys, recipe, *options, "--seed", "5")


def test_a_sweep_is_submitted_again_without_what_is_complete(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = tmp_path / "sweep.txt"
    sweep.write_text("".join(f"--seed {seed}\n" for seed in range(1, 7)))

    def finish(*numbers: int) -> None:
        for number in numbers:
            run = tmp_path / "run" / str(number)
            run.mkdir(parents=True)
            (run / "config.yaml").write_text(dump_config(tiny_config({"run_dir": run, "seed": number})))
            (run / "result.json").write_text("{}")

    finish(1, 4, 6)
    words = command(capsys, recipe, "--sweep", sweep)
    assert words[words.index("--array") + 1] == "2-3,5"
    finish(2, 3, 5)
    assert "run 6: run_dir" in refusal(capsys, recipe, "--sweep", sweep)


def test_refusal_of_slurm_is_one_line(recipe: Path, sbatch: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sbatch.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition\nspecified: x' >&2\nexit 1\n")
    expected = "submit: sbatch: error: invalid partition specified: x"
    assert refusal(capsys, recipe, "--gpus-per-node", "2", "--partition", "x") == expected


def test_missing_slurm_is_named(
    recipe: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert refusal(capsys, recipe).startswith("submit: sbatch is not there")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_valid_and_alike(name: str) -> None:
    script = scripts_folder() / f"{name}.sbatch"
    subprocess.run(["bash", "-n", script, scripts_folder() / "run.sh"], check=True)
    text = script.read_text()
    # Slurm reads its options up to the first command only.
    assert "#SBATCH" not in text[text.index("set -euo") :]
    options = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.MULTILINE))
    assert options["signal"] == "USR1@120"
    assert options["gpus-per-node"] == options["ntasks-per-node"]
    assert {"requeue", "open-mode", "output", "time"} <= options.keys()


def test_scripts_are_found_from_a_job() -> None:
    environment = {**os.environ, "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, "-m", "mlomae.slurm"], env=environment, capture_output=True, text=True, check=True
    )
    assert (Path(done.stdout.strip()) / "run.sh").is_file()
