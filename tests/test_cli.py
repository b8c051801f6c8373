"""The command line: bad input gets one line, exit code 2 and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlomae.cli import main
from mlomae.config import Config, dump_config, flatten
from mlomae.train_command import parse
from tests.integration.tiny import (
    FEW_TO_FIT,
    read_metrics,
    tiny_config,
    train,
    without_pictures,
    write_recipe,
)

ROOT = Path(__file__).resolve().parents[1]
Refuse = Callable[..., str]


@pytest.fixture
def refuse(tmp_path: Path, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest) -> Refuse:
    """Runs ``mlomae train`` on the tiny recipe with more arguments; returns the line it is refused with.

    Nothing may be printed beside that line, and nothing may have been written.
    """
    recipe = write_recipe(tmp_path / "tiny.yaml", {})

    def run(*arguments: str | Path, run_dir: Path | None = None) -> str:
        target = tmp_path / "run" if run_dir is None else run_dir
        argv = ["train", "--config", recipe, "--run-dir", target, *arguments]
        before = listing(tmp_path)
        capsys.readouterr()
        code = main([str(argument) for argument in argv])
        printed = capsys.readouterr()
        assert code == 2
        assert printed.out == ""
        assert listing(tmp_path) == before
        (line,) = printed.err.splitlines()
        prefix = "mlomae: error: "
        assert line.startswith(prefix)
        return line.removeprefix(prefix)

    return run


def listing(folder: Path) -> dict[str, bytes]:
    """All files below a folder with their contents; a lock file may come and go."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in folder.rglob("*")
        if path.name != ".lock"
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--itertions", "3"], "itertions: unknown key; did you mean 'iterations'?"),
        (["--iterations", "many"], "iterations: input should be a valid integer, "),
        (["--masking.ratio", "1"], "masking.ratio: input should be less than 1, found 1"),
        (["--masking.ratio", "0.99"], "config: masking.ratio 0.99 keeps 0 of 16 patches; at least one"),
        (["--model.img_size", "9"], "model: img_size (9, 9) is not divisible by patch_size 2; choose"),
        (["--model", "3"], "model: expected a mapping of fields, found 3"),
        (["--pretrain.lr", ".nan"], "pretrain.lr: input should be a finite number, found nan"),
        (["--seed"], "--seed: no value given"),
        (["--seed", "--iterations", "3"], "--seed: no value given"),
        (["junk"], "argument 'junk': expected --section.field value"),
        (["train"], "argument 'train': expected --section.field value"),
        (["--seed", "1", "2"], "argument '2': expected --section.field value"),
        (["--confg", "x"], "--confg: unknown; did you mean '--config'?"),
        (["--deepspeed-confg=x"], "--deepspeed-confg: unknown; did you mean '--deepspeed-config'?"),
        (["-s", "1"], "argument '-s': expected --section.field value"),
        (["--", "1"], "argument '--': expected --section.field value"),
        (["--=1"], "argument '--=1': expected --section.field value"),
        (
            ["--deepspeed_config"],
            "argument --deepspeed_config/--deepspeed-config: expected one argument; see",
        ),
        (
            ["--pretrain.batch_size", "5000"],
            "pretrain.batch_size: 5000 exceeds its set of 1147 images; lower it",
        ),
        (["--model.in_chans", "3"], "model.in_chans: found 3, but digits has 1; set model.in_chans=1"),
        (["--data.dataset", "cifar10"], "data: path is missing; dataset 'cifar10' needs the folder"),
    ],
)
def test_bad_arguments_get_one_line(arguments: list[str], message: str, refuse: Refuse) -> None:
    assert refuse(*arguments).startswith(message)


@pytest.mark.parametrize("dataset, what", [("folder", "images"), ("shards", "shards")])
def test_a_missing_data_folder_is_named(dataset: str, what: str, tmp_path: Path, refuse: Refuse) -> None:
    nowhere = tmp_path / "nowhere"

    line = refuse("--data.dataset", dataset, "--data.path", nowhere)

    assert line == f"data.path: {nowhere} is not a folder; give the folder that holds the {what}"


@pytest.mark.parametrize("dataset", ["cifar10", "cifar100"])
def test_missing_cifar_is_named(dataset: str, tmp_path: Path, refuse: Refuse) -> None:
    nowhere = tmp_path / "nowhere"

    line = refuse("--data.dataset", dataset, "--data.path", nowhere, "--model.in_chans", "3")

    assert line.startswith("data.path: no CIFAR-10")
    assert f" in {nowhere}; put torchvision's copy of it there or set data.download=true" in line


def test_an_empty_data_folder_is_named(tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "images").mkdir()
    options = ["--data.path", tmp_path / "images"]

    assert refuse("--data.dataset", "folder", *options).startswith("data.path: no images in ")
    assert refuse("--data.dataset", "shards", *options).startswith("data.path: no train-*.tar in ")


def test_missing_labels_are_named(tmp_path: Path, refuse: Refuse) -> None:
    from PIL import Image

    (tmp_path / "images").mkdir()
    for number in range(40):
        Image.new("L", (8, 8), number).save(tmp_path / "images" / f"{number}.png")

    line = refuse("--data.dataset", "folder", "--data.path", tmp_path / "images")

    assert line == (
        f"data.path: {tmp_path / 'images'} has no labels; the head and mask levels need them "
        "(masking.policy=random does not)"
    )


def test_recipes_that_cannot_be_read_are_named(tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "list.yaml").write_text("- 1\n")

    assert refuse("--config", tmp_path / "none.yaml").startswith(
        f"--config {tmp_path / 'none.yaml'}: cannot be"
    )
    assert refuse("--config", tmp_path / "list.yaml").startswith(
        f"--config {tmp_path / 'list.yaml'}: found list"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"optimizer": {"type": "Adam"}}, "optimizer belongs in the recipe"),
        ({"zero_optimization": {"stage": "auto"}}, 'zero_optimization.stage is "auto"'),
        ({"bf16": {"enabled": True}}, "bf16 would cast the weights"),
        ({"zero_optimisation": {}}, "unknown key zero_optimisation"),
        ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4, supported are 0, 1, 2 and 3"),
        (None, "cannot be read (No such file or directory)"),
    ],
)
def test_bad_deepspeed_configurations_get_one_line(
    content: Any, message: str, tmp_path: Path, refuse: Refuse
) -> None:
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_text(json.dumps(content))

    for flag in ("--deepspeed_config", "--deepspeed-config"):
        assert refuse(flag, path).startswith(f"--deepspeed_config {path}: {message}")


def test_a_run_directory_of_another_run_is_refused(
    tmp_path: Path, refuse: Refuse, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pictures(monkeypatch)
    other = tmp_path / "other"
    train(tiny_config({"run_dir": other, "iterations": 1, "pretrain.lr": 0.5}))

    line = refuse(run_dir=other)

    assert line == (
        f"run_dir {other}: holds a different run (iterations is 1 there, 4 asked for; "
        "pretrain.lr is 0.5 there, 0.001 asked for); choose another run_dir or delete it"
    )


def test_a_folder_of_something_else_is_refused(tmp_path: Path, refuse: Refuse) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "draft.txt").write_text("do not touch")

    line = refuse(run_dir=tmp_path / "thesis")

    found = "is not empty and not a run directory (no config.yaml); choose another one"
    assert line == f"run_dir {tmp_path / 'thesis'}: {found}"
    assert refuse(run_dir=tmp_path / "tiny.yaml").endswith("cannot be read (Not a directory)")


@pytest.mark.parametrize(
    ("fields", "found"),
    [
        (
            {"model.decoder_dim": 32},
            "pretrain.weight.decoder.mask_token is [1, 1, 16] there, [1, 1, 32] here",
        ),
        ({"model.decoder_depth": 2}, "pretrain.weight.decoder.blocks.1.norm1.weight is missing there"),
        ({"masking.policy": "random"}, "head.exp_avg.linear.bias is there, not expected here"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    fields: dict[str, Any],
    found: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    without_pictures(monkeypatch)
    train(tiny_config({"run_dir": tmp_path / "a", "iterations": 1}))
    config = tiny_config({"run_dir": tmp_path / "b", **fields})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.yaml").write_text(dump_config(config))
    shutil.copytree(tmp_path / "a" / "checkpoints", tmp_path / "b" / "checkpoints")
    before = listing(tmp_path)
    capsys.readouterr()

    assert main(["train", "--config", str(tmp_path / "b" / "config.yaml")]) == 2

    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    checkpoint = tmp_path / "b" / "checkpoints" / "step-00000001"
    assert line.startswith(f"mlomae: error: checkpoint {checkpoint}: is of another model (")
    assert found in line
    assert printed.out == ""
    assert listing(tmp_path) == before


def test_dashes_underscores_and_equals_signs_are_all_read() -> None:
    config, _ = parse(["--run-dir=a", "--log-every", "3", "--pretrain.unroll_steps=5"])
    same, _ = parse(["--run_dir", "a", "--log_every=3", "--pretrain.unroll-steps", "5"])

    assert config == same
    assert (str(config.run_dir), config.log_every, config.pretrain.unroll_steps) == ("a", 3, 5)


def test_values_may_be_negative_contain_equals_signs_and_be_repeated() -> None:
    config, ds_path = parse(
        [
            "--run-dir=x=y",
            "--seed",
            "1",
            "--seed",
            "2",
            "--deepspeed_config=d.json",
            "--local_rank=1",
        ]
    )

    assert (str(config.run_dir), config.seed, ds_path) == ("x=y", 2, Path("d.json"))


def test_help_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["train", "--help"])

    assert raised.value.code == 0
    shown = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  --")}
    assert {f"--{name}" for name in flatten(Config().model_dump())} <= shown


@pytest.mark.parametrize("command", ["hypergrad-check", "profile"])
def test_commands_beside_training_explain_themselves(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as raised:
        main([command, "--help"])
    assert raised.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: mlomae {command} RUN | --config FILE [options]\n")

    recipe = write_recipe(tmp_path / "tiny.yaml", {})
    for arguments, message in (
        (["--sed", "3"], "sed: unknown key; did you mean 'seed'?"),
        (["--masking.ratio", "2"], "masking.ratio: input should be less than 1, found 2"),
        (["junk"], "argument 'junk': expected --section.field value"),
        (["--jsn"], "--jsn: unknown; did you mean '--json'?"),
    ):
        assert main([command, "--config", str(recipe), *arguments]) == 2
        assert capsys.readouterr() == ("", f"mlomae: error: {message}\n")
    assert list(tmp_path.iterdir()) == [recipe]


def test_a_saved_configuration_can_be_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pictures(monkeypatch)
    recipe = write_recipe(tmp_path / "tiny.yaml", {**FEW_TO_FIT, "iterations": 2})
    first, second = tmp_path / "first", tmp_path / "second"

    assert main(["train", "--config", str(recipe), "--run-dir", str(first), "--seed", "7"]) == 0
    assert main(["train", "--config", str(first / "config.yaml"), "--run-dir", str(second)]) == 0

    assert read_metrics(first) == read_metrics(second)
    saved = [yaml.safe_load((folder / "config.yaml").read_text()) for folder in (first, second)]
    assert [tree.pop("run_dir") for tree in saved] == [str(first), str(second)]
    assert saved[0] == saved[1]
    assert saved[0]["seed"] == 7
    assert "knn_accuracy: " in capsys.readouterr().out


def test_the_script_answers_bad_input_at_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", "--run-dir", tmp_path / "run", "--masking.ratio", "2"],
        capture_output=True, text=True, timeout=60, cwd=tmp_path,
    )  # fmt: skip

    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "mlomae: error: masking.ratio: input should be less than 1, found 2\n"
    assert list(tmp_path.iterdir()) == []
