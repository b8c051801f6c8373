"""The command line: ``mlomae train --config FILE --section.field value …``, and commands beside it."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from mlomae import __version__
from mlomae.arguments import (
    EXIT_INTERRUPTED,
    EXIT_LOST,
    EXIT_OK,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    Parser,
    positive,
)
from mlomae.config import Config, load_config
from mlomae.errors import LostRank, Preempted, UserError
from mlomae.preemption import Preemption
from mlomae.sections import Section

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
    """Runs a command; returns its exit code, see ``mlomae.arguments``."""
    words = sys.argv[1:] if argv is None else argv
    try:
        if words and words[0] == "hypergrad-check":
            return _check_hypergradient(words[1:])
        if words and words[0] == "profile":
            return _profile(words[1:])
        if words and words[0] == "shards":
            from mlomae.sharding.command import main as shards

            return shards(words[1:])
        if words and words[0] == "plan":
            from mlomae.planning.command import main as plan

            return plan(words[1:], _overrides)
        if words and words[0] == "eval":
            from mlomae.downstream.command import main as evaluate

            return evaluate(words[1:], _overrides, _describe)
        if words and words[0] == "export":
            from mlomae.interop.command import main as export

            return export(words[1:])
        if words and words[0] == "submit":
            from mlomae.slurm.submit import main as submit

            return submit(words[1:])
        return _train(words)
    except UserError as error:
        print(f"mlomae: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Preempted as stop:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(f"mlomae: {stop}", file=sys.stderr)
        return EXIT_PREEMPTED
    except LostRank as error:
        print(f"mlomae: error: {error}", file=sys.stderr)
        return EXIT_LOST
    except KeyboardInterrupt:
        print("mlomae: interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED


def parse(argv: Sequence[str]) -> tuple[Config, Path | None]:
    """The resolved configuration and the path of the DeepSpeed configuration, if given."""
    known, rest = _parser().parse_known_args(argv)
    return load_config(known.config, _overrides(rest)), known.deepspeed_config


def _train(argv: Sequence[str]) -> int:
    config, ds_path = parse(argv)
    with Preemption() as preemption:
        # Imported late: --help and configuration errors answer at once.
        from mlomae.run import run

        result = run(config, ds_path, preemption)
    for name, value in result.items():
        print(f"{name}: {value}")
    return EXIT_OK


def _check_hypergradient(argv: Sequence[str]) -> int:
    run, known, config = _run_or_recipe("hypergrad-check", _check_parser(), argv)
    from mlomae.hypergrad_check import check, rows
    from mlomae.hypergrad_view import draw, show
    from mlomae.run_dir import RunDir, to_json

    with tempfile.TemporaryDirectory() as empty:
        # A recipe starts at its beginning, whatever its own run directory holds.
        run_dir = RunDir(run or Path(empty), config)
        result = check(config, run_dir, known.images, known.bf16)
    if known.json:
        print(to_json(rows(result), indent=2))
    else:
        show(result)
    plot = known.plot or (None if known.json else (run or Path()) / "hypergradient.png")
    if plot is not None:
        draw(result, plot)
        print(f"plot: {plot}", file=sys.stderr if known.json else sys.stdout)
    return EXIT_OK


def _profile(argv: Sequence[str]) -> int:
    run, known, config = _run_or_recipe("profile", _profile_parser(), argv)
    if known.deepspeed_config not in (None, "no"):
        given = known.deepspeed_config
        raise UserError(f"--deepspeed_config {given}: profile runs plain torch engines only; leave it out")
    trace = known.trace or (run or Path()) / "profile.json.gz"
    from mlomae.profile_view import check_writable, packed, show, values, write
    from mlomae.profiling import profile_run
    from mlomae.run_dir import RunDir, to_json

    files = {"trace": trace} | ({"plot": known.plot} if known.plot else {})
    for name, path in files.items():
        check_writable(f"--{name}", path)
    with tempfile.TemporaryDirectory() as empty:
        # A recipe starts at its beginning, whatever its own run directory holds.
        result = profile_run(config, RunDir(run or Path(empty), config), known.iterations)
    write("--trace", trace, packed(trace, result.trace))
    if known.plot:
        from mlomae.profile_plot import draw

        write("--plot", known.plot, draw(result))
    if known.json:
        print(to_json(values(result), indent=2))
    else:
        show(result)
    for name, path in files.items():
        print(f"{name}: {path}", file=sys.stderr if known.json else sys.stdout)
    return EXIT_OK


def _run_or_recipe(
    command: str, parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[Path | None, argparse.Namespace, Config]:
    """The run directory, if that is the first word; the command's own options; the configuration."""
    # First of all words: later ones may be values of fields, which the parser does not know.
    run = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    known, rest = parser.parse_known_args(argv if run is None else argv[1:])
    if (run is None) == (known.config is None):
        raise UserError(f"{command}: give a run directory or --config FILE; see {command} --help")
    path = known.config if run is None else run / "config.yaml"
    return run, known, load_config(path, _overrides(rest))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlomae",
        description=DESCRIPTION,
        epilog=EXAMPLES + "\n".join(_describe(Config)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "command", choices=["train"], metavar="command",
        help="train: pretrain and evaluate one run; others: see `mlomae hypergrad-check --help`, "
        "`mlomae profile --help`, `mlomae plan --help`, `mlomae shards --help`, `mlomae submit --help`, "
        "`mlomae eval --help` and `mlomae export --help`",
    )  # fmt: skip
    parser.add_argument("--config", type=Path, metavar="FILE", help="recipe in YAML; defaults where absent")
    parser.add_argument(
        "--deepspeed_config", "--deepspeed-config", type=Path, metavar="FILE",
        help="ZeRO, communication and precision; without it, plain torch",
    )  # fmt: skip
    # Passed by the deepspeed launcher; the rank is read from the environment.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    return parser


def _check_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlomae hypergrad-check",
        usage="mlomae hypergrad-check RUN | --config FILE [options]",
        description="Compares every estimator of the hypergradient with the exact one, at the last "
        "checkpoint of a run or at the beginning of a recipe: cosine, relative error, time and memory. "
        "Every field of the configuration is a flag, as in train.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="recipe in YAML, instead of a run")
    parser.add_argument("--images", type=positive, metavar="N", help="per batch (default: 32 at most)")
    parser.add_argument("--bf16", action="store_true", help="run the passes under bf16 autocast")
    parser.add_argument("--json", action="store_true", help="print a list of estimates instead of the table")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE",
        help="PNG of error against radius and price (default: hypergradient.png in RUN, or here; "
        "with --json, none)",
    )  # fmt: skip
    return parser


def _profile_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlomae profile",
        usage="mlomae profile RUN | --config FILE [options]",
        description="Shows where the time of an outer iteration goes, after the last checkpoint of a run or "
        "at the beginning of a recipe: by part, by kind of operation, and the most expensive operators. "
        "Nothing in the run directory changes but the trace. Every other field of the configuration is a "
        "flag, as in train.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="recipe in YAML, instead of a run")
    parser.add_argument(
        "--iterations", type=positive, metavar="N",
        help="outer iterations to profile (default: hypergradient.every, a full cycle)",
    )  # fmt: skip
    parser.add_argument(
        "--trace", type=Path, metavar="FILE",
        help="trace for chrome://tracing or ui.perfetto.dev, packed if it ends in .gz "
        "(default: profile.json.gz in RUN, or here)",
    )  # fmt: skip
    parser.add_argument("--plot", type=Path, metavar="FILE", help="PNG of one outer iteration as a timeline")
    parser.add_argument("--json", action="store_true", help="print one object instead of the tables")
    parser.add_argument("--deepspeed_config", "--deepspeed-config", metavar="no", help=argparse.SUPPRESS)
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
        kinds = [kind for kind in get_args(field.annotation) if isinstance(kind, type)]
        if default is None and kinds and issubclass(kinds[0], Section):
            default = kinds[0]()
        if isinstance(default, Section):
            lines += ["", *_describe(type(default), f"{prefix}{name}.")]
        else:
            choices = " | ".join(map(str, get_args(field.annotation)))
            text = field.description or (choices if get_origin(field.annotation) is Literal else "")
            lines.append(f"  --{prefix + name:<28} {default!s:<12} {text}".rstrip())
    return lines
