"""``mlomae recipes``, and recipes by their names."""

from __future__ import annotations

from pathlib import Path

import pytest

import mlomae.recipes
from mlomae.cli import main
from mlomae.config import load_config
from mlomae.errors import UserError
from mlomae.recipes import find_recipe, recipes
from mlomae.recipes.command import first_sentence
from tests.architecture.source_tree import ROOT


def test_every_recipe_is_listed_with_its_first_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0

    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    files = {
        path.relative_to(ROOT / "recipes").with_suffix("").as_posix()
        for path in ROOT.glob("recipes/**/*.yaml")
    }
    assert set(lines) == files
    assert lines["digits"].startswith("Handwritten digits (8x8, ")
    # "et al. 2022" ends no sentence, and "data.path" begins one.
    assert lines["linear/imagenet_vit_b16"].startswith(
        "Linear probe of a ViT-B/16 on ImageNet-1k as in MAE (He et al."
    )
    assert lines["finetune/cars"] == "Stanford Cars (8,144 training images of 196 classes) with a ViT-B/16."


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("# One.\n# Two.\nseed: 1\n", "One."),
        ("# One goes\n#   on. Two.\n\n# Three.\n", "One goes on."),
        ("# No full stop\nseed: 1\n", "No full stop"),
        ("seed: 1\n# late.\n", ""),
        ("", ""),
    ],
)
def test_first_sentence(text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(text)

    assert first_sentence(tmp_path / "x.yaml") == sentence


def test_a_recipe_is_printed_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "show", "finetune/cifar10"]) == 0

    assert capsys.readouterr().out == (ROOT / "recipes" / "finetune" / "cifar10.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["show", "digts"], "argument NAME: invalid choice: 'digts'; did you mean 'digits'?"),
        (["show", "zzz"], "argument NAME: invalid choice: 'zzz'; known: bccd_micro, camvid_micro, "),
        (["show"], "the following arguments are required: NAME; see --help"),
        (["digits"], "argument show: invalid choice: 'digits'; known: show"),
    ],
)
def test_misuse(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", *words]) == 2

    assert capsys.readouterr().err.startswith(f"mlomae: error: {line}")


def test_config_takes_the_name_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    expected = load_config(ROOT / "recipes" / "digits.yaml", {})

    assert load_config(Path("digits"), {}) == expected
    # A folder of that name is no configuration, a file is.
    (tmp_path / "digits").mkdir()
    assert load_config(Path("digits"), {}) == expected
    (tmp_path / "digits").rmdir()
    (tmp_path / "digits").write_text("seed: 9\n")
    assert load_config(Path("digits"), {}).seed == 9


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digts", "--config digts: no such file, and no recipe; did you mean 'digits'?"),
        (
            "finetune/cifar",
            "--config finetune/cifar: no such file, and no recipe; did you mean 'finetune/cifar",
        ),
        ("zzz", "--config zzz: no such file, and no recipe; known: "),
        # What is written like a file is no name.
        ("digits.yaml", "--config digits.yaml: cannot be read (No such file or directory)"),
        ("/digits", "--config /digits: cannot be read (No such file or directory)"),
    ],
)
def test_an_unknown_name_is_refused(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(UserError) as refused:
        load_config(Path(name), {})
    assert str(refused.value).startswith(message)


def test_a_wheel_carries_its_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ``files`` lies beside the package, the folder of the clone is not asked."""
    (tmp_path / "files" / "linear").mkdir(parents=True)
    (tmp_path / "files" / "linear" / "mine.yaml").write_text("seed: 3\n")
    monkeypatch.setattr(mlomae.recipes, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.chdir(tmp_path)

    assert list(recipes()) == ["linear/mine"]
    assert find_recipe(Path("linear/mine")) == tmp_path / "files" / "linear" / "mine.yaml"
