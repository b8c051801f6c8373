"""The command line: a table of commands, each a module of its own, and how their ends are told."""

from __future__ import annotations

import argparse
import os
import select
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

from mlomae import __version__
from mlomae.arguments import (
    EXIT_CODES,
    EXIT_INTERRUPTED,
    EXIT_LOST,
    EXIT_PREEMPTED,
    EXIT_UNREAD,
    EXIT_USER_ERROR,
    Parser,
    did_you_mean,
)
from mlomae.errors import Interrupted, LostRank, Preempted, UserError


@dataclass(frozen=True)
class Command:
    """A command of ``mlomae``.

    Attributes:
        module: imported when it is run; its ``main(words)`` parses the words first of all, with a ``Parser``,
            and returns the exit code.
        summary: one line of the overview.
    """

    module: str
    summary: str


GROUPS = {
    "train": {
        "train": Command("mlomae.train_command", "pretrain and evaluate one run, or resume it"),
    },
    "compare": {
        "study": Command("mlomae.study.command", "arms, seeds and budgets compared: runs, results, a report"),
    },
    "look at runs": {
        "report": Command("mlomae.report.command", "one HTML page about one or several runs"),
        "visualize": Command("mlomae.visualize_command", "what the mask removes of your own images"),
        "profile": Command("mlomae.profile_command", "where the time of an iteration goes"),
        "hypergrad-check": Command("mlomae.hypergrad_command", "the hypergradient against the exact one"),
    },
    "use encoders": {
        "eval": Command(
            "mlomae.downstream.command", "score on a task: knn, linear, finetune, segment, detect"
        ),
        "export": Command("mlomae.interop.command", "write weights for timm, Hugging Face, ONNX and others"),
    },
    "data": {
        "shards": Command("mlomae.sharding.command", "make WebDataset shards, index and check them"),
    },
    "clusters": {
        "plan": Command("mlomae.planning.command", "memory, traffic and time of a run on N GPUs"),
        "submit": Command("mlomae.slurm.submit", "check a run and hand it to Slurm"),
    },
    "this installation": {
        "doctor": Command("mlomae.doctor.command", "check software, devices, kernels, processes and disk"),
        "recipes": Command("mlomae.recipes.command", "list the recipes, or print one"),
        "completion": Command("mlomae.completion", "a completion script for bash, zsh or fish"),
    },
}
COMMANDS = {name: command for group in GROUPS.values() for name, command in group.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit code, see ``mlomae.arguments``."""
    words = sys.argv[1:] if argv is None else argv
    try:
        try:
            return run(words)
        finally:
            # Here, not when the interpreter ends: what cannot be written is an error of this command.
            sys.stdout.flush()
    except BrokenPipeError:
        if _is_read():
            raise
        return EXIT_UNREAD
    except UserError as error:
        print(f"mlomae: error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except Preempted as stop:
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(f"mlomae: {stop}", file=sys.stderr)
        return EXIT_INTERRUPTED if isinstance(stop, Interrupted) else EXIT_PREEMPTED
    except LostRank as error:
        print(f"mlomae: error: {error}", file=sys.stderr)
        return EXIT_LOST
    except KeyboardInterrupt:
        resumes = {"train", "eval"} & set(words[:1])
        more = "; the same command resumes from the last checkpoint" if resumes else ""
        print(f"mlomae: interrupted{more}", file=sys.stderr)
        return EXIT_INTERRUPTED


def run(words: Sequence[str]) -> int:
    """``main`` without its handling of errors."""
    if words and words[0].startswith("--local_rank="):
        words = words[1:]  # the deepspeed launcher's; the rank is read from the environment
    name = words[0] if words else ""
    if name not in COMMANDS:
        _parser().parse_args([word for word in words[:1] if word in ("-h", "--help", "--version")])
        if not name or name.startswith("-"):
            raise UserError(
                f"{name or 'no command given'}: expected a command first, such as train; see --help"
            )
        raise UserError(f"command {name!r}: unknown; {did_you_mean(name, COMMANDS)}")
    code: int = import_module(COMMANDS[name].module).main(words[1:])
    return code


def _is_read() -> bool:
    """Whether anyone reads standard output; if not, what is left of it goes nowhere."""
    output = sys.stdout.fileno()
    watch = select.poll()
    watch.register(output, 0)  # errors are told without being asked for
    if not watch.poll(0):
        return True
    # The interpreter's own flush at its end must not fail again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return False


def _parser() -> Parser:
    lines = []
    for group, commands in GROUPS.items():
        lines += [f"{group}:", *(f"  {name:<17}{command.summary}" for name, command in commands.items()), ""]
    lines += ["exit codes:", *(f"  {code:<5}{meaning}" for code, meaning in EXIT_CODES.items())]
    parser = Parser(
        prog="mlomae",
        usage="mlomae COMMAND …",
        description="MLO-MAE: masked autoencoders whose mask is learned from a downstream task.",
        epilog="\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        examples=(
            "mlomae train --config digits --run-dir runs/digits",
            "mlomae eval knn runs/digits",
            "mlomae shards --help             what a command does, its flags and more examples",
        ),
    )
    parser.add_argument("--version", action="version", version=__version__)
    return parser
