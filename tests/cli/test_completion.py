"""Completion scripts, in the shells themselves."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from mlomae.cli import COMMANDS, main
from mlomae.completion import contexts
from mlomae.completion_scripts import FILE, FOLDER, RECIPE, WRITERS, Context, Option
from mlomae.config import Config, flatten
from mlomae.recipes import recipes

# Calls the function as bash does: the words of the line, cut at "=", and the last of them to be completed.
_BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
complete -p mlomae >/dev/null || exit 3
_mlomae
((${#COMPREPLY[@]})) && printf '%s\\n' "${COMPREPLY[@]}"
exit 0
"""
# Stands for zsh's own functions, which need a terminal; the function itself is the real one.
_ZSH = """
compdef() { : }
compset() { : }
compadd() { shift; print -rl -- "$@" }
_files() { print -r -- "@files $*" }
source "$1"; shift
words=("$@"); CURRENT=$#words
_mlomae
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the three scripts, bash, zsh and fish."""
    folder = tmp_path_factory.mktemp("completion")
    known = contexts()
    for shell, write in WRITERS.items():
        (folder / shell).write_text(write(known, recipes()))
    return folder


def bash(scripts: Path, *words: str, cwd: Path | None = None) -> list[str]:
    done = subprocess.run(
        ["bash", "--norc", "-c", _BASH, "bash", scripts / "bash", "mlomae", *words],
        cwd=cwd, capture_output=True, text=True,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_bash_completes_commands(scripts: Path) -> None:
    assert bash(scripts, "") == list(COMMANDS)
    assert bash(scripts, "re") == ["report", "recipes"]
    assert bash(scripts, "--v") == ["--version"]
    assert bash(scripts, "shards", "") == ["create", "index", "verify", "stats"]
    assert bash(scripts, "eval", "f") == ["finetune"]
    assert bash(scripts, "completion", "") == ["bash", "zsh", "fish"]
    assert bash(scripts, "nonsense", "") == []


def test_bash_completes_every_field(scripts: Path) -> None:
    fields = {f"--{name}" for name in flatten(Config().model_dump())}

    for command in ("train", "profile", "hypergrad-check", "plan", "submit"):
        assert fields <= set(bash(scripts, command, "--"))
    assert bash(scripts, "train", "--model.ar") == ["--model.arch"]
    assert {"--optim.layer_decay", "--augment.mixup"} <= set(bash(scripts, "eval", "finetune", "--"))
    assert "--optim.layer_decay" not in bash(scripts, "eval", "knn", "--")
    assert "--seed" in bash(scripts, "shards", "create", "--")
    assert "--seed" not in bash(scripts, "shards", "verify", "--")


def test_bash_completes_values(scripts: Path) -> None:
    archs = ["vit_pico", "vit_micro", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]

    assert bash(scripts, "train", "--model.arch", "") == archs
    assert bash(scripts, "train", "--model.arch", "=") == archs
    assert bash(scripts, "train", "--model.arch", "=", "vit_b") == ["vit_base"]
    assert bash(scripts, "train", "--data.download", "") == ["true", "false"]
    assert bash(scripts, "train", "--hypergradient.radius", "") == ["auto"]
    assert bash(scripts, "eval", "knn", "--pool", "c") == ["cls", "cls+mean"]
    assert bash(scripts, "shards", "create", "a", "b", "--format", "") == ["keep", "jpg", "png", "webp"]
    assert bash(scripts, "export", "x", "--to", "hf") == ["hf", "hf-vit"]
    # A number can be anything, and is no place for flags; behind a switch they go on.
    assert bash(scripts, "train", "--seed", "") == []
    assert "--dir" in bash(scripts, "doctor", "--json", "--")
    # plan's own --device is a model of GPU, not the field.
    assert bash(scripts, "train", "--device", "") == ["auto", "cpu", "cuda"]
    assert bash(scripts, "plan", "--device", "") == []


def test_bash_completes_recipes_files_and_folders(scripts: Path, tmp_path: Path) -> None:
    (tmp_path / "my run").mkdir()
    (tmp_path / "mine.yaml").touch()
    (tmp_path / "weights.pth").touch()

    assert bash(scripts, "train", "--config", "fine", cwd=tmp_path) == [
        name for name in recipes() if name.startswith("finetune/")
    ]
    assert bash(scripts, "train", "--config", "m", cwd=tmp_path) == ["my run", "mine.yaml"]
    assert bash(scripts, "submit", "dig", cwd=tmp_path) == ["digits"]
    assert bash(scripts, "recipes", "show", "m", cwd=tmp_path) == []
    assert bash(scripts, "profile", "", cwd=tmp_path) == ["my run"]
    assert bash(scripts, "report", "", cwd=tmp_path) == ["my run"]
    assert bash(scripts, "train", "--run_dir", "", cwd=tmp_path) == ["my run"]
    assert sorted(bash(scripts, "eval", "knn", "", cwd=tmp_path)) == ["mine.yaml", "my run", "weights.pth"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("comp",), list(COMMANDS)),
        (("train", "--model.predict", ""), ["removed", "all"]),
        (("train", "--model.predict=re"), ["removed", "all"]),
        (("eval", "knn", "--pool", ""), ["cls", "mean", "cls+mean"]),
        (("profile", ""), ["@files -/"]),
        (("eval", "knn", ""), ["@files "]),
        (("submit", ""), [*recipes(), "@files -g *.yaml"]),
    ],
)
def test_zsh_completes(scripts: Path, words: tuple[str, ...], expected: list[str]) -> None:
    zsh = shutil.which("zsh")
    if zsh is None:
        pytest.skip("needs zsh")
    line = [zsh, "-f", "-c", _ZSH, "zsh", str(scripts / "zsh"), "mlomae", *words]
    done = subprocess.run(line, capture_output=True, text=True)

    assert done.stdout.splitlines() == expected, done.stderr


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("mlomae re", {"recipes", "report"}),
        ("mlomae train --model.pred", {"--model.predict"}),
        ("mlomae train --model.predict ", {"removed", "all"}),
        ("mlomae eval knn --poo", {"--pool"}),
        ("mlomae shards create --format ", {"keep", "jpg", "png", "webp"}),
        ("mlomae submit dig", {"digits"}),
        ("mlomae train --seed ", set()),
    ],
)
def test_fish_completes(scripts: Path, tmp_path: Path, line: str, expected: set[str]) -> None:
    fish = shutil.which("fish")
    if fish is None:
        pytest.skip("needs fish")
    program = 'source $argv[1]; complete -C "$argv[2]"'
    done = subprocess.run(
        [fish, "--no-config", "-c", program, scripts / "fish", line],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip

    assert {found.split("\t")[0] for found in done.stdout.splitlines()} == expected, done.stderr


def test_words_that_shells_would_read_otherwise_are_quoted(tmp_path: Path) -> None:
    option = Option("--kind", "the user's $HOME", ("a+b", "c"))
    known = [Context("", {"it": "it's"}, ()), Context("it", {}, (option,)), Context("it now", {}, ())]
    (tmp_path / "bash").write_text(WRITERS["bash"](known, ["r"]))

    assert bash(tmp_path, "it", "--kind", "") == ["a+b", "c"]
    assert "-a 'it' -d 'it\\'s'" in WRITERS["fish"](known, ["r"])


def test_the_command_prints_the_script(scripts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for shell in WRITERS:
        assert main(["completion", shell]) == 0
        assert capsys.readouterr().out == (scripts / shell).read_text()


def test_each_place_has_one_kind_of_name() -> None:
    known = {context.words: context for context in contexts()}

    assert known["profile"].operands == {FOLDER: ""}
    assert known["submit"].operands == {RECIPE: ""}
    assert known["eval detect"].operands == {FILE: ""}
    assert known["train"].operands == {}
