"""The configuration tree: what is refused and how, and that what is saved can be run again."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlomae.config import Config, dump_config, flatten, load_config
from mlomae.errors import UserError

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.yaml"))


def refusal(recipe: Path | None, overrides: dict[str, str]) -> str:
    """The line with which a recipe with overrides is refused."""
    with pytest.raises(UserError) as raised:
        load_config(recipe, overrides)
    assert len(str(raised.value).splitlines()) == 1
    return str(raised.value)


def refusal_of_text(folder: Path, text: str | bytes) -> str:
    recipe = folder / "recipe.yaml"
    recipe.write_bytes(text if isinstance(text, bytes) else text.encode())
    return refusal(recipe, {}).replace(str(recipe), "RECIPE")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("itertions", "3", "itertions: unknown key; did you mean 'iterations'?"),
        ("model.arhc", "x", "model.arhc: unknown key; did you mean 'arch'?"),
        ("pretrain.unrol_steps", "2", "pretrain.unrol_steps: unknown key; did you mean 'unroll_steps'?"),
        ("eval.zzz", "2", "eval.zzz: unknown key; known: batch_size, knn_k"),
        ("iterations", "abc", "iterations: input should be a valid integer, unable to parse"),
        ("iterations", "2.5", "iterations: input should be a valid integer, got a number with a fractional"),
        ("iterations", "0", "iterations: input should be greater than 0, found 0"),
        ("iterations", "null", "iterations: input should be a valid integer, found None"),
        ("iterations", ".inf", "iterations: input should be a finite number, found inf"),
        ("iterations", "true", "config: iterations is a truth value, found True; expected another type"),
        ("seed", "-1", "seed: input should be greater than or equal to 0, found -1"),
        ("seed", "[1", "--seed: '[1' is not a YAML value"),
        ("seed.x", "3", "seed: input should be a valid integer, found {'x': 3}"),
        ("levels", "4", "levels: input should be 2 or 3, found 4"),
        ("device", "gpu", "device: input should be 'auto', 'cpu' or 'cuda', found 'gpu'"),
        ("run_dir", "1", "run_dir: expected a path (./1 for a folder called 1), found 1"),
        ("model", "3", "model: expected a mapping of fields, found 3"),
        ("model", "[1]", "model: expected a mapping of fields, found [1]"),
        ("model", "", "model: expected a mapping of fields, found None"),
        ("model.arch", "vit_big", "model.arch: input should be 'vit_pico', "),
        ("model.img_size", "[8]", "model.img_size.1: field required, found [8]"),
        ("model.img_size", "[8, 0]", "model.img_size.1: input should be greater than 0, found 0"),
        ("model.img_size", "wide", "model.img_size: input should be a valid integer, "),
        ("model.img_size", "225", "model: img_size (225, 225) is not divisible by patch_size 16; choose"),
        ("model.img_size", "[224, 100]", "model: img_size (224, 100) is not divisible by patch_size 16;"),
        ("model.norm_pix", "maybe", "model.norm_pix: input should be a valid boolean, "),
        ("model.decoder_heads", "7", "model: decoder_dim 512 is not divisible by decoder_heads 7"),
        ("model.decoder_dim", "16.5", "model.decoder_dim: input should be a valid integer, "),
        ("masking.ratio", "0", "masking.ratio: input should be greater than 0, found 0"),
        ("masking.ratio", "1", "masking.ratio: input should be less than 1, found 1"),
        ("masking.ratio", "-0.5", "masking.ratio: input should be greater than 0, found -0.5"),
        ("masking.ratio", ".nan", "masking.ratio: input should be a finite number, found nan"),
        ("masking.ratio", "0.999", "config: masking.ratio 0.999 keeps 0 of 196 patches; at least one must"),
        ("masking.ratio", "1e-17", "config: masking.ratio 1e-17 keeps 196 of 196 patches; at least one"),
        ("masking.hidden", "10", "masking: hidden 10 is not a multiple of 4 (sin-cos positions)"),
        ("masking.policy", "leanred", "masking.policy: input should be 'learned', 'random', "),
        (
            "data.dataset",
            "cifar10",
            "data: path is missing; dataset 'cifar10' needs the folder or file that holds it",
        ),
        ("data.path", "2020-13-45", "--data.path: '2020-13-45' is not a YAML value"),
        ("pretrain.lr", "-1e-3", "pretrain.lr: input should be greater than or equal to 0, found '-1e-3'"),
        ("pretrain.lr", "yes", "pretrain: lr is a truth value, found True; expected another type"),
        ("pretrain.min_lr", "1", "pretrain: min_lr 1.0 is above lr 0.001"),
        ("head.betas", "0.9", "head.betas: expected a list, found 0.9"),
        ("head.betas", "[0.9, 1]", "head: betas (0.9, 1.0) must be below 1"),
        ("head.betas", "[0.9]", "head.betas.1: field required, found [0.9]"),
        ("mask.warmup", "1.1", "mask.warmup: input should be less than or equal to 1, found 1.1"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: str, message: str) -> None:
    found = refusal(None, {field: value})

    assert found.startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "--config RECIPE: found list, expected a mapping of fields"),
        ("hello", "--config RECIPE: found str, expected a mapping of fields"),
        ("model: {arch: [\n", "--config RECIPE: not valid YAML (while parsing"),
        ("a:\n\tb: 1\n", "--config RECIPE: not valid YAML (while scanning"),
        ("seed: 2020-13-45\n", "--config RECIPE: not valid YAML (month must be in 1..12)"),
        ("seed: !!python/name:os.system x\n", "--config RECIPE: not valid YAML (could not determine"),
        ("seed: 1\n---\nseed: 2\n", "--config RECIPE: not valid YAML (expected a single document"),
        (b"\xff\xfe\x00\x81", "--config RECIPE: not valid YAML ('utf-8' codec can't decode"),
        ("model:\n", "model: expected a mapping of fields, found None"),
        ("1: 2\n", "1: keys should be strings, found 1"),
        ("model: {null: 3}\n", "model.None: keys should be strings, found None"),
        ("seed: |\n  a\n  b\n", "seed: input should be a valid integer, "),
        ("model: {patchsize: 2}\n", "model.patchsize: unknown key; did you mean 'patch_size'?"),
    ],
)
def test_a_wrong_recipe_is_explained(text: str | bytes, message: str, tmp_path: Path) -> None:
    assert refusal_of_text(tmp_path, text).startswith(message)


def test_an_unreadable_recipe_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "none.yaml"

    assert refusal(missing, {}) == f"--config {missing}: cannot be read (No such file or directory)"
    assert refusal(tmp_path, {}) == f"--config {tmp_path}: cannot be read (Is a directory)"


def test_an_override_below_a_value_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: 3\n")

    assert refusal(recipe, {"model.arch": "vit_tiny"}) == (
        "--model.arch: 'model' is a value in the recipe, not a section"
    )


def test_an_empty_recipe_is_the_defaults(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("# nothing\n")

    assert load_config(recipe, {}) == load_config(None, {}) == Config()


def test_overrides_win_over_the_recipe_and_are_read_as_yaml(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("pretrain: {lr: 1.0, batch_size: 3}\n")

    config = load_config(recipe, {"pretrain.lr": "1e-4", "model.img_size": "[32, 48]", "run_dir": "a/b"})

    assert config.pretrain.lr == 1e-4
    assert config.pretrain.batch_size == 3
    assert config.model.grid == (2, 3)
    assert config.run_dir == Path("a/b")


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"model": {"img_size": [32, 48], "norm_pix": False}, "head": {"betas": [0.5, 0.75], "clip": 0.1}},
        {"data": {"dataset": "folder", "path": "some/where", "download": True}, "run_dir": "x y/ü"},
        {"pretrain": {"lr": 1e-5, "eps": 1e-30, "min_lr": 3e-7}, "seed": 2**70},
    ],
)
def test_a_dump_is_read_back_equal(tree: dict[str, Any], tmp_path: Path) -> None:
    config = Config.model_validate(tree)
    recipe = tmp_path / "config.yaml"
    recipe.write_text(dump_config(config))

    assert load_config(recipe, {}) == config
    assert flatten(yaml.safe_load(recipe.read_text())).keys() == flatten(config.model_dump()).keys()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_shipped_recipes_are_accepted(path: Path) -> None:
    config = load_config(path, {})

    assert 0 < config.num_keep < config.model.num_patches


def test_the_tree_is_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().seed = 1  # type: ignore[misc]  # that it fails is the point


@pytest.mark.parametrize(("ratio", "kept"), [(0.75, 49), (0.5, 98), (0.9, 19), (0.7, 58), (0.99, 1)])
def test_the_number_of_kept_patches_is_not_spoiled_by_rounding(ratio: float, kept: int) -> None:
    assert load_config(None, {"masking.ratio": str(ratio)}).num_keep == kept


def test_graphs_do_not_add_up_gradients() -> None:
    load_config(None, {"compute.execution": "compiled", "pretrain.micro_batches": "2"})
    with pytest.raises(UserError, match=r"compute\.execution: graphs works with pretrain\.micro_batches 1"):
        load_config(None, {"compute.execution": "graphs", "pretrain.micro_batches": "2"})


def test_a_key_that_looks_like_a_kind_of_value_is_a_key() -> None:
    with pytest.raises(UserError, match=r"^list\[int\]: unknown key; "):
        load_config(None, {"list[int]": "1"})
    with pytest.raises(UserError, match=r"^masking\.list\[int\]: unknown key; "):
        load_config(None, {"masking.list[int]": "1"})


def test_an_error_is_one_line_whatever_it_quotes() -> None:
    error = UserError("a\nb\x1b[1m\u202e\udcff é ∑")
    assert str(error) == "a\\nb\\x1b[1m\\u202e\\udcff é ∑"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
