"""``mlomae plan``: what a run will need on some number of GPUs, before there are any."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from mlomae.arguments import EXIT_OK, EXIT_PROBLEMS, Parser, positive
from mlomae.config import Config, load_config
from mlomae.config_arguments import parse_known
from mlomae.errors import UserError
from mlomae.sections import Arch

if TYPE_CHECKING:
    from mlomae.planning.memory import Memory
    from mlomae.planning.times import Rate

GIB = 2**30
# The names of devices in mlomae.peaks by what people call them.
_SHORT = {
    "H100": "H100 80GB HBM3",
    "A100": "A100-SXM4-80GB",
    "V100": "V100-SXM2-32GB",
}


def main(argv: Sequence[str]) -> int:
    """Prints the plan of each number of GPUs; returns the exit code (0 all fit, 1 one does not).

    Raises:
        UserError: bad input.
    """
    known, fields = parse_known(_parser(), argv)
    if known.model is None and known.config is None:
        raise UserError("plan: give --model NAME or --config FILE; see plan --help")
    given = {} if known.model is None else _model_fields(known.model)

    def config_of(gpus: int) -> Config:
        batch = known.images_per_gpu * gpus if known.images_per_gpu else known.batch
        return load_config(known.config, {**given, **_batch_fields(batch), **fields})

    # Imported late: --help and misuse answer at once.
    from mlomae.planning.plan import make_plan, values
    from mlomae.planning.view import show, show_sweep

    limit = math.floor(known.gpu_memory * GIB)
    memories = [_memory(known, config_of(count), count) for count in known.gpus]
    rate = _rate(known, memories[0].precision)
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


def _memory(known: argparse.Namespace, config: Config, gpus: int) -> Memory:
    import torch

    from mlomae.distributed.ds_config import check_combination, load_ds_config
    from mlomae.planning.memory import Memory
    from mlomae.planning.sharding import Sharding, read_sharding, shipped
    from mlomae.precision import resolve_precision

    ds_config: dict[str, Any] | None = None
    if known.deepspeed_config is not None:
        ds_config = load_ds_config(known.deepspeed_config)
    elif known.zero is not None:
        ds_config = shipped(known.zero)
    check_combination(config, ds_config)
    precision = resolve_precision(config.compute.precision, torch.device("cuda"), ds_config)
    sharding = Sharding(gpus) if ds_config is None else read_sharding(ds_config, gpus, precision == "bf16")
    return Memory(config, sharding, precision, config.data.num_classes or known.classes)


def _rate(known: argparse.Namespace, precision: str) -> Rate | None:
    from mlomae.peaks import data_sheet_peak
    from mlomae.planning.times import Rate, read_rate

    if known.measured is not None:
        return read_rate(known.measured)
    if known.device is None:
        return None
    name = _SHORT.get(known.device, known.device)
    peak = data_sheet_peak(name, precision)
    if peak is None:
        raise UserError(
            f"--device: found {known.device!r}, of which no peak in {precision} is known; expected "
            f"{', '.join(_SHORT)}, another name as the driver reports it, or --measured FILE"
        )
    return Rate(peak, f"peak of {name} in {precision} by its data sheet", measured=False)


def _parser() -> Parser:
    parser = Parser(
        prog="mlomae plan",
        usage="mlomae plan --model NAME | --config FILE --gpus N [options]",
        description="Memory, communication and time of a run on some number of GPUs, and the largest batch "
        "that fits, computed from the configuration alone. Every other field of the configuration is a "
        "flag, as in train. Exit code 1: it does not fit.",
        examples=(
            "mlomae plan --model vit_huge_patch14 --gpus 64 --gpu-memory 80 --zero 3 --batch 4096",
            "mlomae plan --config imagenet_vit_b16 --gpus 1,8,64 --device H100",
        ),
    )
    parser.add_argument("--model", metavar="NAME", help="such as vit_huge_patch14; replaces the recipe's")
    parser.add_argument("--config", type=Path, metavar="FILE", help="recipe in YAML; defaults where absent")
    parser.add_argument(
        "--gpus", type=_counts, default=[1], metavar="N,…", help="ranks; of a list, one row each (default: 1)"
    )
    parser.add_argument(
        "--gpu-memory", type=_above_zero, default=80.0, metavar="GIB", help="of one GPU (default: 80)"
    )
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument(
        "--zero",
        type=int,
        choices=range(4),
        help="stage of DeepSpeed ZeRO, sizes as in ds_configs/; without it, plain torch",
    )
    ways.add_argument(
        "--deepspeed_config", "--deepspeed-config", type=Path, metavar="FILE", help="stage and buffers"
    )
    batches = parser.add_mutually_exclusive_group()
    batches.add_argument(
        "--batch", type=positive, metavar="N", help="images of all ranks at every level, not the recipe's"
    )
    batches.add_argument("--images-per-gpu", type=positive, metavar="N", help="the same for each rank")
    parser.add_argument(
        "--classes", type=positive, default=1000, metavar="N", help="of the labels of images (default: 1000)"
    )
    parser.add_argument(
        "--measured", type=Path, metavar="FILE",
        help="output of `mlomae profile --json` or record of benchmarks/gpu.py: predicts times",
    )  # fmt: skip
    parser.add_argument("--device", metavar="NAME", help="such as H100: lower bounds of times from its peak")
    parser.add_argument(
        "--link", type=_links, default=(450.0, 50.0), metavar="GB/s[,GB/s]",
        help="that a GPU sends within a node, and between nodes (default: 450,50, assumed: NVLink of an "
        "H100, and 400 Gbit/s for each GPU)",
    )  # fmt: skip
    parser.add_argument("--gpus-per-node", type=positive, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--json", action="store_true", help="print plain values instead of tables")
    return parser


def _counts(text: str) -> list[int]:
    return [positive(word) for word in text.split(",")]


def _above_zero(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not (value > 0 and math.isfinite(value)):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected a number above 0")
    return value


def _links(text: str) -> tuple[float, float]:
    """Within a node, and between nodes: the same if there is one number only."""
    speeds = [_above_zero(word) for word in text.split(",")]
    if len(speeds) > 2:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected one number or two")
    return speeds[0], speeds[-1]
