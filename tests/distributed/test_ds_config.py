"""What a DeepSpeed configuration file may say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlomae.distributed.ds_config import OWNED_BY_RECIPE, check_combination, load_ds_config, merge
from mlomae.errors import UserError
from mlomae.sections import PretrainConfig
from tests.integration.tiny import tiny_config

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "ds_configs").glob("*.json"))


def refusal_of(path: Path) -> str:
    """The one line with which a file is refused, without the file's name."""
    with pytest.raises(UserError) as raised:
        load_ds_config(path)
    text = str(raised.value)
    assert "\n" not in text
    prefix = f"--deepspeed_config {path}: "
    assert text.startswith(prefix)
    return text.removeprefix(prefix)


def write(folder: Path, content: Any) -> Path:
    path = folder / "ds.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_are_accepted(path: Path) -> None:
    assert load_ds_config(path) == json.loads(path.read_text())


def test_an_empty_object_is_accepted(tmp_path: Path) -> None:
    assert load_ds_config(write(tmp_path, {})) == {}


@pytest.mark.parametrize("key", OWNED_BY_RECIPE)
def test_keys_of_the_recipe_are_refused(key: str, tmp_path: Path) -> None:
    assert refusal_of(write(tmp_path, {key: 1})) == (
        f"{key} belongs in the recipe ({OWNED_BY_RECIPE[key]}); remove it here"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "found list, expected an object"),
        ({"zero_optimisation": {}}, "unknown key zero_optimisation; allowed: comms_logger, "),
        ({"bf16": {"enabled": True}}, "bf16 would cast the weights, "),
        ({"fp16": {"enabled": True}}, "fp16 would cast the weights, "),
        ({"zero_optimization": "auto"}, 'zero_optimization is "auto", '),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": "auto"}},
            'zero_optimization.reduce_bucket_size is "auto", ',
        ),
        (
            {"torch_autocast": {"lower_precision_safe_modules": ["torch.nn.Linear", "auto"]}},
            'torch_autocast.lower_precision_safe_modules.1 is "auto", ',
        ),
        ({"zero_optimization": 1}, "zero_optimization is 1, expected an object"),
        ({"torch_autocast": True}, "torch_autocast is True, expected an object"),
        (
            {"zero_optimization": {"stage": 4}},
            "zero_optimization.stage is 4, supported are 0, 1, 2 and 3",
        ),
        (
            {"zero_optimization": {"stage": "1"}},
            "zero_optimization.stage is '1', supported are 0, 1, 2 and 3",
        ),
        (
            {"zero_optimization": {"stage": True}},
            "zero_optimization.stage is True, supported are 0, 1, 2 and 3",
        ),
        (
            {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
            "zero_optimization.offload_optimizer needs stage 1 or 2 or 3, found 0",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "zero_optimization.offload_param needs stage 3, found 2",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}},
            "zero_optimization.offload_param.device is 'nvme', supported is 'cpu': the hypergradient reads",
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "disk"}}},
            "zero_optimization.offload_optimizer.device is 'disk', supported is 'cpu'",
        ),
        (
            {"zero_optimization": {"stage": 1, "offload_optimizer": "cpu"}},
            "zero_optimization.offload_optimizer is 'cpu', expected an object",
        ),
        (
            {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
            "zero_optimization.offload_optimizer: ratio and super_offload need DeepSpeed's own Adam",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}},
            "zero_optimization.zero_quantized_weights would round what it sends",
        ),
        (
            {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}},
            "zero_optimization.zero_hpz_partition_size would keep copies of the weights",
        ),
        (
            {"zero_optimization": {"stage": 3}, "prescale_gradients": True},
            "prescale_gradients does not work with stage 3; remove it",
        ),
        (
            {"torch_autocast": {"enabled": True, "dtyp": "bfloat16"}},
            "unknown key torch_autocast.dtyp; allowed: dtype, enabled, lower_precision_safe_modules",
        ),
        (
            {"torch_autocast": {"enabled": True, "dtype": "float16"}},
            "torch_autocast.dtype is 'float16', supported is 'bfloat16'",
        ),
        (
            {"torch_autocast": {"enabled": "yes"}},
            "torch_autocast.enabled is 'yes', expected true or false",
        ),
    ],
)
def test_what_would_go_wrong_later_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    assert refusal_of(write(tmp_path, content)).startswith(message)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x81")

    assert refusal_of(tmp_path / "missing.json") == "cannot be read (No such file or directory)"
    assert refusal_of(tmp_path) == "cannot be read (Is a directory)"
    assert refusal_of(tmp_path / "broken.json").startswith("not valid JSON (Expecting property name")
    assert refusal_of(tmp_path / "binary.json").startswith("not valid JSON ('utf-8' codec can't decode")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"hypergradient.estimator": "jvp"},
            "hypergradient.estimator: jvp needs whole weights on every rank",
        ),
        ({"hypergradient.estimator": "exact"}, "hypergradient.estimator: exact needs whole weights"),
        ({"compute.execution": "compiled"}, "compute.execution: compiled needs a module without hooks"),
        ({"compute.execution": "graphs"}, "compute.execution: graphs needs a module without hooks"),
    ],
)
def test_what_zero_3_cannot_do_is_refused(fields: dict[str, Any], message: str) -> None:
    config = tiny_config(fields)
    with pytest.raises(UserError) as raised:
        check_combination(config, {"zero_optimization": {"stage": 3}})
    assert str(raised.value).startswith(message)
    assert "\n" not in str(raised.value)

    for section in (None, {}, {"zero_optimization": {"stage": 2}}):
        check_combination(config, section)


def test_zero_3_accepts_automatic_choices_and_runs_without_hypergradient() -> None:
    stage3 = {"zero_optimization": {"stage": 3}}
    check_combination(tiny_config({}), stage3)
    check_combination(tiny_config({"masking.policy": "random", "hypergradient.estimator": "jvp"}), stage3)


def test_the_recipe_supplies_batch_and_clipping() -> None:
    full = merge({"zero_optimization": {"stage": 1}}, PretrainConfig(batch_size=12), world_size=4)

    assert full["zero_optimization"] == {"stage": 1}
    assert full["train_batch_size"] == 12
    assert full["train_micro_batch_size_per_gpu"] == 3
    assert full["gradient_accumulation_steps"] == 1
    # DeepSpeed clips at 1 where this is absent.
    assert full["gradient_clipping"] == 0.0
