"""``mlomae plan``: what a run will need on some number of GPUs, before there are any."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

from mlomae.arguments import EXIT_OK, EXIT_PROBLEMS, Parser, positive
from mlomae.config import Config, load_config
from mlomae.errors import UserError
from mlomae.sections import Arch

GIB = 2**30
Overrides = Callable[[Sequence[str]], dict[str, str]]
# The names of devices in mlomae.peaks by what people call them.
_SHORT = {
    "H100": "H100 80GB HBM3",
    "A100": "A100-SXM4-80GB",
    "V100": "V100-SXM2-32GB",
}


def main(argv: Sequence[str], overrides: Overrides) -> int:
    """Prints the plan of each number of GPUs; returns the exit code (0 all fit, 1 one does not).

    Args:
        overrides: turns ['--section.field', 'value'] into {'section.field': 'value'}.

    Raises:
        UserError: bad input.
    """
    known, rest = _parser().parse_known_args(argv)
    if known.model is None and known.config is None:
        raise UserError("plan: give --model NAME or --config FILE; see plan --help")
    fields = {**_batch_fields(known.batch), **overrides(rest)}
    if known.model is not None:
        fields = {**_model_fields(known.model), **fields}
    config = load_config(known.config, fields)
    # Imported late: --help and misuse answer at once.
    from mlomae.planning.plan import make_plan, values
    from mlomae.planning.view import show, show_sweep

    rate, limit = _rate(known, config), math.floor(known.gpu_memory * GIB)
    memories = [_memory(known, config, count) for count in known.gpus]
    plans = [make_plan(memory, limit, rate, known.link, known.gpus_per_node) for memory in memories]
    if known.json:
        from mlomae.run_dir import to_json

        rows = [values(plan) for plan in plans]
        print(to_json(rows[0] if len(rows) == 1 else rows, indent=2))
    elif len(plans) == 1:
        show(plans[0])
    else:
        show_sweep(plans)
    return EXIT_OK if all(plan.total <= limit for plan in plans) else EXIT_PROBLEMS


def _model_fields(name: str) -> dict[str, str]:
    """vit_huge_patch14 or vit_base_patch16_224 → fields."""
    found = re.fullmatch(r"(vit_[a-z]+)_patch(\d+)(?:_(\d+))?", name)
    if found is None or found[1] not in get_args(Arch):
        known = ", ".join(f"{arch}_patchN" for arch in get_args(Arch))
        raise UserError(f"--model: found {name!r}, expected one of {known}")
    size = {} if found[3] is None else {"model.img_size": found[3]}
    return {"model.arch": found[1], "model.patch_size": found[2], **size}


def _batch_fields(batch: int | None) -> dict[str, str]:
    if batch is None:
        return {}
    return {f"{level}.batch_size": str(batch) for level in ("pretrain", "head", "mask")}


def _memory(known: argparse.Namespace, config: Config, gpus: int):  # type: ignore[no-untyped-def]
    from mlomae.distributed.ds_config import load_ds_config
    from mlomae.planning.activations import BF16, FLOAT32
    from mlomae.planning.memory import Memory
    from mlomae.planning.sharding import Sharding, read_sharding

    ds_config = None if known.deepspeed_config is None else load_ds_config(known.deepspeed_config)
    bf16 = _precision(config, ds_config) == "bf16"
    if ds_config is not None:
        sharding = read_sharding(ds_config, gpus, bf16)
    elif known.zero is not None:
        sharding = replace(
            read_sharding({"zero_optimization": {"stage": known.zero}}, gpus, bf16), bf16=bf16
        )
    else:
        sharding = Sharding(gpus)
    return Memory(config, sharding, BF16 if bf16 else FLOAT32, known.classes)
