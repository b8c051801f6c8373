"""The command line: ``mlomae train --config FILE --section.field value …``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from mlomae import __version__
from mlomae.config import Config, Section, load_config
from mlomae.errors import UserError

EXIT_OK = 0
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

DESCRIPTION = "MLO-MAE: masked autoencoders whose mask is learned from a downstream task."
EXAMPLES = """\
examples:
  python train.py --config recipes/digits.yaml --run-dir runs/digits
  python train.py --config recipes/digits.yaml --run-dir runs/x --iterations 200 --pretrain.lr 1e-4
  deepspeed train.py --deepspeed_config ds_configs/zero1.json --config recipes/digits.yaml
  torchrun --nproc_per_node 2 train.py --config recipes/digits.yaml

Running the same command again resumes an unfinished run. Every field below is also a flag.

"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code (0 done, 2 bad input, 130 interrupted)."""
    try:
        return _train(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"mlomae: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt:
        print("mlomae: interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED


def parse(argv: Sequence[str]) -> tuple[Config, Path | None]:
    """The resolved configuration and the path of the DeepSpeed configuration, if given."""
    known, rest = _parser().parse_known_args(argv)
    return load_config(known.config, _overrides(rest)), known.deepspeed_config


def _train(argv: Sequence[str]) -> int:
    config, ds_path = parse(argv)
    # Imported late: --help and configuration errors answer at once.
    from mlomae.run import run

    result = run(config, ds_path)
    for name, value in result.items():
        print(f"{name}: {value}")
    return EXIT_OK


class _Parser(argparse.ArgumentParser):
    """Reports misuse as one line, without the usage text."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="mlomae",
        description=DESCRIPTION,
        epilog=EXAMPLES + "\n".join(_describe(Config)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("command", choices=["train"], help="train: pretrain and evaluate one run")
    parser.add_argument("--config", type=Path, metavar="FILE", help="recipe in YAML; defaults where absent")
    parser.add_argument(
        "--deepspeed_config", "--deepspeed-config", type=Path, metavar="FILE",
        help="ZeRO, communication and precision; without it, plain torch in float32",
    )  # fmt: skip
    # Passed by the deepspeed launcher; the rank is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser


def _overrides(rest: Sequence[str]) -> dict[str, str]:
    """['--pretrain.lr', '1e-4', '--run-dir=x'] → {'pretrain.lr': '1e-4', 'run_dir': 'x'}."""
    overrides: dict[str, str] = {}
    words = iter(rest)
    for word in words:
        name, equals, value = word[2:].partition("=")
        if not word.startswith("--") or not name:
            raise UserError(f"argument {word!r}: expected --section.field value")
        if not equals:
            following = next(words, None)
            if following is None or following.startswith("--"):
                raise UserError(f"--{name}: no value given")
            value = following
        overrides[name.replace("-", "_")] = value
    return overrides


def _describe(section: type[Section], prefix: str = "") -> list[str]:
    """One line a field: name, default, choices or description."""
    lines = []
    for name, field in section.model_fields.items():
        default: Any = field.default
        if isinstance(default, Section):
            lines += ["", *_describe(type(default), f"{prefix}{name}.")]
        else:
            choices = " | ".join(map(str, get_args(field.annotation)))
            text = field.description or (choices if get_origin(field.annotation) is Literal else "")
            lines.append(f"  --{prefix + name:<28} {default!s:<12} {text}".rstrip())
    return lines
