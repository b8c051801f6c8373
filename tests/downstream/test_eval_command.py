"""``mlomae eval``: its words, its folder, and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mlomae.arguments import EXIT_OK, EXIT_PREEMPTED, EXIT_USER_ERROR
from mlomae.cli import main
from mlomae.distributed import collectives
from mlomae.downstream import finetune
from mlomae.downstream.fit import Fit
from mlomae.errors import Preempted, UserError

WORDS = [
    "--optim.epochs=1", "--optim.batch_size=700", "--augment.rand_augment=none", "--augment.crop=none",
    "--augment.mixup=0", "--augment.cutmix=0", "--augment.erasing=0", "--device=cpu",
]  # fmt: skip


@pytest.fixture
def encoder(digits_run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to write into."""
    shutil.copytree(digits_run, tmp_path / "run")
    return tmp_path / "run"


def evaluate(encoder: Path, *more: str) -> int:
    return main(["eval", "finetune", str(encoder), *WORDS, *more])


@pytest.fixture(scope="module")
def once(digits_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run, evaluated."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(digits_run, folder)
    assert evaluate(folder) == EXIT_OK
    return folder


@pytest.fixture
def evaluated(once: Path, encoder: Path) -> Path:
    """An evaluated run, to write into."""
    shutil.rmtree(encoder)
    shutil.copytree(once, encoder)
    return encoder


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line with which the command ends."""
    capsys.readouterr()
    assert main(["eval", *words]) == EXIT_USER_ERROR
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("mlomae: error: ")
    return lines[0].removeprefix("mlomae: error: ")


def results(encoder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (encoder / "evaluations.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "words",
    [["eval", "knn", "RUN"], ["visualize", "RUN", "x.png"], ["profile", "RUN"], ["hypergrad-check", "RUN"]],
    ids=lambda words: words[0],
)
def test_a_command_in_a_strangers_run_is_not_run(
    words: list[str], encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = yaml.safe_load((encoder / "config.yaml").read_text())
    command = f"pipe:touch {tmp_path}/was-run; cat {tmp_path}/train-{{0..1}}.tar"
    config["data"] |= {"dataset": "shards", "path": command}
    (encoder / "config.yaml").write_text(yaml.safe_dump(config))
    Image.new("L", (8, 8)).save(tmp_path / "x.png")
    given = {"RUN": str(encoder), "x.png": str(tmp_path / "x.png")}
    assert main([given.get(word, word) for word in words]) == EXIT_USER_ERROR
    line = (
        f"mlomae: error: data.path: {encoder}/config.yaml names a command, which is run only if you give it: "
    )
    assert capsys.readouterr().err.startswith(line)
    assert not (tmp_path / "was-run").exists()


def test_results_are_left_in_the_run(once: Path) -> None:
    out = once / "eval" / "finetune"

    result = json.loads((out / "result.json").read_text())
    assert result["task"] == "finetune" and result["encoder"] == str(once) and not result["scratch"]
    assert 0 <= result["accuracy"] <= 1 and result["epochs"] == 1
    names = {"config.yaml", "metrics.jsonl", "checkpoint.safetensors", "model.safetensors", "predictions.png"}
    assert names <= {path.name for path in out.iterdir()}
    (row,) = results(once)
    assert row.items() >= result.items() and row["out"] == "eval/finetune" and row["time"].startswith("20")


def test_a_complete_evaluation_is_not_repeated(
    evaluated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object) -> dict[str, Any]:
        raise AssertionError("repeated")

    monkeypatch.setattr(finetune, "run", run)

    assert evaluate(evaluated, "--log-every", "3") == EXIT_OK  # which changes nothing that is computed
    result = json.loads((evaluated / "eval" / "finetune" / "result.json").read_text())
    assert capsys.readouterr().out.splitlines() == [f"{name}: {value}" for name, value in result.items()]
    assert len(results(evaluated)) == 1


def test_another_recipe_needs_another_folder(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refusal(capsys, "finetune", str(evaluated), *WORDS, "--optim.lr=0.5")
    assert "holds a different run (optim.lr is 0.004 there, 0.5 asked for)" in line

    assert evaluate(evaluated, "--optim.lr=0.5", "--out", f"{evaluated}/b") == EXIT_OK
    assert [row["out"] for row in results(evaluated)] == ["eval/finetune", "b"]


def test_other_weights_need_another_folder(evaluated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(evaluated / "checkpoints")  # which are read before the file beside them
    path = evaluated / "encoder.safetensors"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    weights["cls_token"] = weights["cls_token"] + torch.finfo(torch.float32).eps
    save_file(weights, path, metadata)

    assert "holds a different run (fingerprint is " in refusal(capsys, "finetune", str(evaluated), *WORDS)
    recorded = str(evaluated / "eval" / "finetune" / "config.yaml")
    assert refusal(capsys, "finetune", str(evaluated), "--config", recorded).startswith("fingerprint: ")


def test_a_result_belongs_to_its_images(
    colour_run: Path, colour_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, elsewhere = shutil.copytree(colour_run, tmp_path / "run"), tmp_path / "elsewhere"
    shutil.copytree(colour_folder, elsewhere)
    assert main(["eval", "knn", str(run), "--device", "cpu"]) == EXIT_OK

    line = refusal(capsys, "knn", str(run), "--device", "cpu", "--data.path", str(elsewhere))

    assert f"data.path is {colour_folder} there, {elsewhere} asked for" in line


def test_a_result_that_is_not_listed_yet_is_listed(evaluated: Path) -> None:
    (before,) = results(evaluated)
    (evaluated / "evaluations.jsonl").unlink()  # as if the command had been killed before
    for _ in range(2):
        assert evaluate(evaluated) == EXIT_OK
    (after,) = results(evaluated)
    assert after | {"time": before["time"]} == before


def test_ranks_must_read_the_same_weights(
    encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(collectives, "broadcast_object", lambda _: "those of rank 0")

    line = refusal(capsys, "finetune", str(encoder), *WORDS)

    assert line.startswith("encoder: rank 0 reads other weights (") and "name one of its checkpoints" in line
    assert not (encoder / "eval").exists()


def test_the_baseline_from_scratch_has_its_own_folder(encoder: Path) -> None:
    assert evaluate(encoder, "--scratch", "true") == EXIT_OK

    assert (encoder / "eval" / "finetune-scratch" / "result.json").exists()
    assert results(encoder)[0]["scratch"] is True


def test_a_preempted_evaluation_says_so(
    encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(self: Fit) -> dict[str, Any]:
        raise Preempted("stopped by SIGTERM after step 1, which is saved; the same command goes on")

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "run", run)
        assert evaluate(encoder) == EXIT_PREEMPTED
    assert "the same command goes on" in capsys.readouterr().err

    assert evaluate(encoder) == EXIT_OK


def test_a_mistake_leaves_the_folder_free(encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The corrected command may use it."""
    assert "optim.batch_size: 7000 exceeds" in refusal(
        capsys, "finetune", str(encoder), *WORDS, "--optim.batch_size=7000"
    )

    assert evaluate(encoder) == EXIT_OK


def test_what_was_begun_keeps_its_folder(
    encoder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save = Fit._save

    def fail(self: Fit) -> None:
        save(self)
        raise UserError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "_save", fail)
        assert refusal(capsys, "finetune", str(encoder), *WORDS) == "disk full"

    assert "holds a different run" in refusal(capsys, "finetune", str(encoder), *WORDS, "--seed=4")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ((), "the following arguments are required: TASK; see --help"),
        (("finetun",), "argument TASK: invalid choice: 'finetun'"),
        (("finetune",), "eval: no encoder given; name a run directory or a file with weights"),
        (("finetune", "--optim.epochs", "3"), "eval: no encoder given"),
        (("finetune", "nowhere", "--data.dataset", "digits"), "nowhere: "),
        (("finetune", "nowhere"), "data.dataset: missing, and nowhere is of no run"),
        (("finetune", "RUN", "--optim.epoch", "3"), "optim.epoch: unknown key; did you mean 'epochs'?"),
        (("finetune", "RUN", "--augment.mixupp", "3"), "augment.mixupp: unknown key; did you mean 'mixup'?"),
        (("finetune", "RUN", "--optim.lr", "1", "--optim.min_lr", "2"), "optim: min_lr 2.0 is above lr 1.0"),
        (
            ("finetune", "RUN", "--augment.rand_augment", "x"),
            "augment.rand_augment: 'x' is neither none nor timm's",
        ),
        (("finetune", "RUN", "--pool", "cls"), "pool: input should be 'avg' or 'token', found 'cls'"),
        (("finetune", "RUN", "3"), "argument '3': expected --section.field value"),
    ],
)
def test_misuse_is_one_line(
    digits_run: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], line: str
) -> None:
    words = tuple(str(digits_run) if word == "RUN" else word for word in words)

    assert line in refusal(capsys, *words)
    assert not (digits_run / "eval").exists()


def test_weights_without_a_run_need_a_folder(
    digits_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(digits_run / "encoder.safetensors", tmp_path / "weights.safetensors")

    line = refusal(capsys, "finetune", str(tmp_path / "weights.safetensors"), "--data.dataset", "digits")

    assert line.startswith(("out: ", str(tmp_path)))  # or these weights alone are not enough


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--help",), ("finetune   a classifier, trained with the encoder", "eval TASK --help")),
        (("finetune", "--help"), ("--optim.layer_decay", "--augment.rand_augment", "--scratch")),
    ],
)
def test_help(capsys: pytest.CaptureFixture[str], words: tuple[str, ...], expected: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["eval", *words])

    text = capsys.readouterr().out
    assert stop.value.code == 0 and all(part in text for part in expected)
