"""``mlomae train``: from the command line to one run."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mlomae.arguments import EXIT_OK, Parser
from mlomae.config import Config, load_config
from mlomae.config_arguments import add_display_flags, describe, parse_known, show_result
from mlomae.preemption import Preemption

DESCRIPTION = """\
Pretrains a masked autoencoder whose mask is learned from a downstream task, and evaluates it. Running the
same command again resumes an unfinished run. Every field below is also a flag."""


def main(argv: Sequence[str]) -> int:
    """Trains, evaluates and prints the result; returns the exit code.

    Raises:
        mlomae.errors.UserError: bad input.
        mlomae.errors.Preempted: a signal asked to stop.
        mlomae.errors.LostRank: another rank was lost or is stuck.
    """
    config, ds_path = parse(argv)
    with Preemption() as preemption:
        # Imported late: --help and configuration errors answer at once.
        from mlomae.run import run

        result = run(config, ds_path, preemption)
    show_result(result, config.display)
    return EXIT_OK


def parse(argv: Sequence[str]) -> tuple[Config, Path | None]:
    """The resolved configuration and the path of the DeepSpeed configuration, if given."""
    known, fields = parse_known(_parser(), argv)
    return load_config(known.config, fields), known.deepspeed_config


def _parser() -> Parser:
    parser = Parser(
        prog="mlomae train",
        usage="mlomae train [--config FILE] [--deepspeed_config FILE] [--section.field value …]",
        description=DESCRIPTION,
        epilog="fields, with their defaults:\n" + "\n".join(describe(Config)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        examples=(
            "mlomae train --config digits --run-dir runs/digits",
            "mlomae train --config digits --run-dir runs/x --iterations 200 --pretrain.lr 1e-4",
            "deepspeed train.py --deepspeed_config ds_configs/zero1.json --config recipes/digits.yaml",
            "torchrun --nproc_per_node 2 train.py --config recipes/digits.yaml",
        ),
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE",
        help="recipe in YAML, or the name of one that `mlomae recipes` lists; defaults where absent",
    )  # fmt: skip
    parser.add_argument(
        "--deepspeed_config", "--deepspeed-config", type=Path, metavar="FILE",
        help="ZeRO, communication and precision; without it, plain torch",
    )  # fmt: skip
    add_display_flags(parser)
    # Passed by the deepspeed launcher; the rank is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser
