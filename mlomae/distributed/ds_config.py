"""DeepSpeed configuration files: what they may say, and how a level's own keys are added.

A ds_config owns ZeRO and communication, and may set the precision; the recipe owns batch sizes, rates,
schedules and clipping. A key in the wrong place is an error, because DeepSpeed would let it win silently.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mlomae.config import Config
from mlomae.errors import UserError
from mlomae.sections import LevelConfig

OWNED_BY_RECIPE = {
    "train_batch_size": "<level>.batch_size",
    "train_micro_batch_size_per_gpu": "<level>.batch_size",
    "gradient_accumulation_steps": "pretrain.micro_batches",
    "optimizer": "<level>.lr, weight_decay, betas, eps",
    "scheduler": "<level>.lr, min_lr, warmup",
    "gradient_clipping": "<level>.clip",
    "steps_per_print": "log_every",
}
ALLOWED = {
    "zero_optimization",
    "torch_autocast",
    "communication_data_type",
    "prescale_gradients",
    "gradient_predivide_factor",
    "comms_logger",
    "wall_clock_breakdown",
    "dump_state",
}
PRECISION_HINT = (
    "would cast the weights, which swallows the finite-difference perturbation; "
    'use "torch_autocast": {"enabled": true, "dtype": "bfloat16"}, which keeps them float32'
)
SUPPORTED_STAGES = (0, 1, 2, 3)
ROUNDS = "would round what it sends, which swallows the finite-difference perturbation"
COPIES = "would keep copies of the weights that the finite-difference perturbation does not reach"
# Keys of zero_optimization: the only value that works, and what another one would do.
ZERO_LIMITS: dict[str, tuple[Any, str]] = {
    "zero_quantized_weights": (False, ROUNDS),
    "zero_quantized_nontrainable_weights": (False, ROUNDS),
    "zero_quantized_gradients": (False, ROUNDS),
    "zero_hpz_partition_size": (1, COPIES),
    "mics_shard_size": (-1, COPIES),
    "zenflow": (None, "would let the weights that passes see lag behind the optimizer's"),
    "cpu_offload": (False, "is an old name; use offload_optimizer"),
    "cpu_offload_param": (False, "is an old name; use offload_param"),
    "compute_grad_norm": (True, "would leave the gradient's norm unknown, which is logged and clipped"),
}
ON_DISK = "the hypergradient reads moments and gradients between steps, when they would be on disk"
# DeepSpeed's default, and the class that stands for the first of them in the autoencoder.
_SAFE_MODULES = [
    "torch.nn.modules.linear.Linear",
    "torch.nn.modules.conv.Conv1d",
    "torch.nn.modules.conv.Conv2d",
    "torch.nn.modules.conv.Conv3d",
]
_OUR_LINEAR = "mlomae.models.linear.Linear"
AUTOCAST_KEYS = {"enabled", "dtype", "lower_precision_safe_modules"}


def load_ds_config(path: Path) -> dict[str, Any]:
    """Reads and checks a DeepSpeed configuration file.

    Raises:
        UserError: unreadable, not JSON, a key the recipe owns, an ``auto`` value, or a ZeRO stage or
            precision that the hypergradient cannot use.
    """
    where = f"--deepspeed_config {path}"
    try:
        config = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise UserError(f"{where}: not valid JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{where}: found {type(config).__name__}, expected an object")
    for key in config:
        if key in OWNED_BY_RECIPE:
            raise UserError(f"{where}: {key} belongs in the recipe ({OWNED_BY_RECIPE[key]}); remove it here")
        if key in ("bf16", "fp16"):
            raise UserError(f"{where}: {key} {PRECISION_HINT}")
        if key not in ALLOWED:
            raise UserError(f"{where}: unknown key {key}; allowed: {', '.join(sorted(ALLOWED))}")
    _refuse_auto(config, where)
    for section in ("zero_optimization", "torch_autocast"):
        if not isinstance(config.get(section, {}), dict):
            raise UserError(f"{where}: {section} is {config[section]!r}, expected an object")
    _check_zero(config.get("zero_optimization", {}), where)
    _check_autocast(config.get("torch_autocast", {}), where)
    if zero_stage(config) == 3:
        for key, works in (("prescale_gradients", False), ("gradient_predivide_factor", 1.0)):
            if config.get(key, works) != works:
                raise UserError(f"{where}: {key} does not work with stage 3; remove it")
    return config


def check_combination(config: Config, ds_config: dict[str, Any] | None) -> None:
    """Refuses what a recipe and a checked DeepSpeed configuration cannot do together.

    Raises:
        UserError: whole weights or whole graphs are asked for where ZeRO 3 shards the weights.
    """
    if zero_stage(ds_config) != 3:
        return
    estimator, execution = config.hypergradient.estimator, config.compute.execution
    if config.masking.learns and estimator in ("jvp", "exact"):
        raise UserError(
            f"hypergradient.estimator: {estimator} needs whole weights on every rank, which ZeRO 3 does not "
            "keep; use fd or auto"
        )
    if execution in ("compiled", "graphs"):
        raise UserError(
            f"compute.execution: {execution} needs a module without hooks, by which ZeRO 3 gathers its "
            "weights; use eager or auto"
        )


def zero_stage(ds_config: dict[str, Any] | None) -> int:
    """Stage of a checked configuration; 0 for plain torch."""
    stage: int = (ds_config or {}).get("zero_optimization", {}).get("stage", 0)
    return stage


def merge(
    ds_config: dict[str, Any], level: LevelConfig, world_size: int, micro_batches: int = 1
) -> dict[str, Any]:
    """The complete DeepSpeed configuration of one level: the file's keys and the recipe's."""
    if (autocast := ds_config.get("torch_autocast", {})).get("enabled"):
        # DeepSpeed reduces the gradients of these classes in bf16, by their exact names.
        safe = autocast.get("lower_precision_safe_modules", _SAFE_MODULES)
        ours = [_OUR_LINEAR] if _SAFE_MODULES[0] in safe else []
        ds_config = {
            **ds_config, "torch_autocast": {**autocast, "lower_precision_safe_modules": [*safe, *ours]}
        }  # fmt: skip
    return {
        **ds_config,
        "train_batch_size": level.batch_size,
        "train_micro_batch_size_per_gpu": level.batch_size // (world_size * micro_batches),
        "gradient_accumulation_steps": micro_batches,
        # Written out: DeepSpeed's own default clips at 1.0.
        "gradient_clipping": level.clip,
        # torch's AdamW steps offloaded tensors too; DeepSpeed's would be compiled at the start.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        # It waits for the device twice in every step.
        "timers": {"throughput": {"enabled": False}},
    }


def _check_zero(section: dict[str, Any], where: str) -> None:
    stage = section.get("stage", 0)
    if stage not in SUPPORTED_STAGES or isinstance(stage, bool):
        raise UserError(f"{where}: zero_optimization.stage is {stage!r}, supported are 0, 1, 2 and 3")
    for key, (works, reason) in ZERO_LIMITS.items():
        if section.get(key, works) != works:
            raise UserError(f"{where}: zero_optimization.{key} {reason}")
    for key, stages in (("offload_optimizer", (1, 2, 3)), ("offload_param", (3,))):
        if key in section:
            _check_offload(section[key], stage, stages, f"{where}: zero_optimization.{key}")


def _check_offload(section: Any, stage: int, stages: tuple[int, ...], where: str) -> None:
    if not isinstance(section, dict):
        raise UserError(f"{where} is {section!r}, expected an object")
    device = section.get("device", "none")
    if device == "nvme":
        raise UserError(f"{where}.device is 'nvme', supported is 'cpu': {ON_DISK}")
    if device != "cpu":
        raise UserError(f"{where}.device is {device!r}, supported is 'cpu'")
    if stage not in stages:
        raise UserError(f"{where} needs stage {' or '.join(map(str, stages))}, found {stage}")
    if section.get("ratio", 1.0) != 1.0 or section.get("super_offload", False):
        raise UserError(f"{where}: ratio and super_offload need DeepSpeed's own Adam; leave them out")


def _check_autocast(section: dict[str, Any], where: str) -> None:
    unknown = [key for key in section if key not in AUTOCAST_KEYS]
    if unknown:
        # DeepSpeed would ignore it.
        known = ", ".join(sorted(AUTOCAST_KEYS))
        raise UserError(f"{where}: unknown key torch_autocast.{unknown[0]}; allowed: {known}")
    if section.get("dtype", "bfloat16") != "bfloat16":
        # float16 would need its losses scaled, and DeepSpeed then skips steps silently.
        raise UserError(f"{where}: torch_autocast.dtype is {section['dtype']!r}, supported is 'bfloat16'")
    if not isinstance(section.get("enabled", False), bool):
        raise UserError(f"{where}: torch_autocast.enabled is {section['enabled']!r}, expected true or false")


def _refuse_auto(node: Any, where: str, field: str = "") -> None:
    if node == "auto":
        raise UserError(f'{where}: {field} is "auto", which DeepSpeed replaces silently; write the value')
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        _refuse_auto(child, where, f"{field}.{key}".lstrip("."))
