"""How each documented command is executed: as it stands, made small, or, if there is no other way, parsed.

A command belongs to the first rule whose pattern it fits as a whole. To account for a new command, give it a
rule here, or write it so that it fits one; ``Parsed`` is for what needs other hardware, a cluster, a download
or hours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from mlomae.arguments import EXIT_OK, EXIT_PROBLEMS
from tests.docs import parsers
from tests.docs.commands import Command

Texts = Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What fits a pattern runs as it stands.

    Attributes:
        pattern: of whole commands.
        instead: what stands for words that a reader replaces; regular expressions.
        given: names of ``Stock`` by the path under which the command finds them.
        codes: with which it may end.
        needs: a package without which it is skipped.
        slow: it starts processes that import torch by themselves.
    """

    pattern: str
    instead: Texts = field(default_factory=dict)
    given: Texts = field(default_factory=dict)
    codes: tuple[int, ...] = (EXIT_OK,)
    needs: str | None = None
    slow: bool = False


@dataclass(frozen=True, kw_only=True)
class Scaled(Rule):
    """What fits runs with ``more`` at its end, which makes it small."""

    more: str


@dataclass(frozen=True, kw_only=True)
class Parsed(Rule):
    """The words of what fits are parsed by the program that they are for.

    Attributes:
        parse: raises if they are wrong.
        why: it is not run.
    """

    parse: Callable[[list[str]], object]
    why: str


# Of all rules: what a reader replaces by something of their own.
INSTEAD = {
    r"\bRECIPE\b": "recipes/digits.yaml",
    r"\bRUN\b": "runs/run",
    r"\bPHOTOS\b": "photos",
    r"\bHOSTS\b": "hosts",
    r"\bHOST\b": "localhost",
    r"\bN\b": "0",
    r"\bSTAGE\b": "3",
    r" …": "",
    r" \[(--[^\]]*)\]": r" \1",
    # Folders of other machines.
    r"(?<=\s)/(data|scratch)/": r"\1/",
}

_ON_DIGITS = "--iterations 2 --data.test_fraction 0.8 --data.heldout_fraction 0.5"
_TINY_DECODER = "--model.decoder_dim 16 --model.decoder_depth 1 --model.decoder_heads 2"
_TINY_MODEL = f"--model.arch vit_pico --model.img_size 32 --model.patch_size 8 {_TINY_DECODER}"
_FEW = "--pretrain.batch_size 8 --head.batch_size 8 --mask.batch_size 8 --iterations 2 --data.workers 0"
_IN_COLOUR = "--data.dataset folder --data.path colours --data.workers 0"
_ONE_EPOCH = "--optim.epochs 1 --optim.batch_size 8"
_SEGMENT = f"{_ONE_EPOCH} --img_size 32 --data.path scenes --data.workers 0 --head.channels 16"
_THREE_CLASSES = "--data.num_classes 3 --data.first_label 0 --data.void '[7]'"
_DETECT = (
    f"{_ONE_EPOCH} --img_size 64 --data.path boxes --data.workers 0 --head.out_channels 16 --head.hidden 32 "
    "--head.samples 16 --head.proposals 32"
)
_DIGITS_RECIPE = r"--config (recipes/digits\.yaml|digits)\b"
_TRAIN = r"(mlomae train|python train\.py|\.venv/bin/python train\.py)"
# Finds tests and runs none. Libraries that pytest's plugins come from are loaded already: see Workplace.
_COLLECT = "--collect-only -q -n0 -p no:cacheprovider -W ignore::pytest.PytestAssertRewriteWarning"
_GPUS = "needs eight GPUs, or several machines"

RULES: tuple[Rule, ...] = (
    # Installing, which .ci/run does with the same lines.
    Parsed(pattern=r"python3 -m venv \S+", parse=parsers.venv, why="this environment is one"),
    Parsed(pattern=r"(\.venv/bin/)?pip install .*", parse=parsers.pip_install, why="downloads"),
    Parsed(pattern=r"\.ci/run", parse=parsers.script, why="runs these tests"),
    Parsed(pattern=r"\.ci/nightly", parse=parsers.script, why="takes hours"),
    Parsed(pattern=r"python -m build .*", parse=parsers.build, why="compiles, as tests/architecture does"),
    Rule(pattern=r"source \.venv/bin/activate"),
    Scaled(pattern=r"(\.venv/bin/)?ruff check \.", more="--exit-zero"),
    Rule(pattern=r"(\.venv/bin/)?ruff format \."),
    Parsed(pattern=r"(\.venv/bin/)?mypy", parse=parsers.mypy, why="takes a minute, and .ci/run does it"),
    # Training.
    Scaled(pattern=rf"{_TRAIN} .*{_DIGITS_RECIPE}.* --loggers .*wandb.*", more=_ON_DIGITS, needs="wandb"),
    Scaled(pattern=rf"{_TRAIN} .*{_DIGITS_RECIPE}.*", more=_ON_DIGITS),
    Scaled(
        pattern=rf"{_TRAIN} .*--model\.weights .*",
        more=_FEW,
        given={"recipes/x.yaml": "recipe", "mae_pretrain_vit_base.pth": "weights", "colours": "colours"},
    ),
    Scaled(
        pattern=rf"{_TRAIN} .*--config recipes/(imagenet|cifar10)\w+\.yaml.*",
        more=f"{_TINY_MODEL} {_FEW} {_IN_COLOUR}", given={"colours": "colours"},
    ),
    Scaled(
        pattern=rf"torchrun --nproc_per_node 2 train\.py .*{_DIGITS_RECIPE}.*", more=_ON_DIGITS, slow=True
    ),
    Scaled(
        pattern=rf"deepspeed (--num_gpus \d )?train\.py .*{_DIGITS_RECIPE}.*", more=_ON_DIGITS, slow=True
    ),
    Parsed(pattern=r"torchrun .*", parse=parsers.torchrun, why=_GPUS),
    Parsed(
        pattern=r"deepspeed .*", parse=parsers.deepspeed, why=_GPUS,
        instead={r"\bFILE\b": "ds_configs/zero3.json"}, given={"hosts": "hosts"},
    ),
    # Clusters.
    Scaled(pattern=r"mlomae submit (?!.*--dry-run).*", more="--dry-run", given={"sweep.txt": "sweep"}),
    Rule(pattern=r"mlomae submit .* --dry-run"),
    Parsed(pattern=r"sbatch .*", parse=parsers.sbatch, why="needs a cluster; tests/slurm has one"),
    Rule(pattern=r"mlomae study .* --dry-run"),
    Rule(
        pattern=r"mlomae study \S+/results\.json.*",
        given={"runs/digits/results.json": "results"},
    ),
    # A list of the runs, each of whose configurations is resolved; tests/study trains some.
    Scaled(pattern=r"mlomae study \S+\.yaml.*", more="--dry-run"),
    Rule(pattern=r"mlomae plan .*", codes=(EXIT_OK, EXIT_PROBLEMS)),
    # Runs and encoders.
    Rule(pattern=r"mlomae (report|visualize|export|eval knn) runs/.*", given={"colours": "colours"}),
    Rule(pattern=r"mlomae profile .*"),
    Scaled(pattern=r"mlomae hypergrad-check .*", more="--images 4"),
    Scaled(
        pattern=r"mlomae eval linear runs/.*", more="--epochs 1 --data.workers 0",
        given={"colours": "colours"},
    ),
    Scaled(
        pattern=r"mlomae eval finetune runs/.*'data/cifar10/train.*",
        more=f"{_ONE_EPOCH} --data.path shards --data.test_path null", given={"shards": "shards"},
    ),
    Scaled(
        pattern=r"mlomae eval finetune runs/.*", more=f"{_ONE_EPOCH} {_IN_COLOUR}",
        given={"colours": "colours"},
    ),
    Scaled(
        pattern=r"mlomae eval segment runs/.*/ade20k_.*",
        more=f"{_SEGMENT} {_THREE_CLASSES}",
        given={"scenes": "scenes"},
    ),
    Scaled(
        pattern=r"mlomae eval segment runs/.*/camvid\.yaml.*",
        more=f"{_SEGMENT} {_THREE_CLASSES} --data.names '[a, b, c]'", given={"scenes": "scenes"},
    ),
    Scaled(pattern=r"mlomae eval detect runs/.*", more=_DETECT, given={"boxes": "boxes"}),
    Rule(pattern=r"tail -n \d+ runs/\w+/metrics\.jsonl"),
    # Without the server that would wait for a browser.
    Scaled(pattern=r"tensorboard --logdir runs", more="--inspect", given={"runs/x": "digits-run"}, slow=True),
    # Data.
    Parsed(pattern=r"--data\.dataset .*", parse=parsers.train, why="flags alone; no such data are here"),
    Parsed(pattern=r"mlomae shards create .* --download\b.*", parse=parsers.shards, why="downloads"),
    Rule(
        pattern=r"mlomae shards create .*",
        given={"photos": "colours", "data/photos": "colours", "table.csv": "table", "colours": "colours"},
    ),
    Rule(pattern=r"mlomae shards (verify|stats) \S+", given={"shards": "shards"}),
    Rule(
        pattern=r"mlomae shards index 'https://host/\S+'.*",
        instead={r"'https://host/\S+'": "'given/train-{000000..000000}.tar'"}, given={"given": "shards"},
    ),
    # This installation.
    Rule(pattern=r"mlomae doctor.*", codes=(EXIT_OK, EXIT_PROBLEMS), slow=True),
    Rule(pattern=r"mlomae recipes\b.*"),
    Rule(pattern=r"mkdir -p \S+"),
    Rule(pattern=r"(\.venv/bin/)?mkdocs build", needs="mkdocs", slow=True),
    Rule(pattern=r"mlomae completion (bash|zsh|fish) > \S+"),
    # Tests and benchmarks.
    Scaled(
        pattern=r"(\.venv/bin/)?pytest .*benchmarks.*", more=_COLLECT,
        instead={r"--json FILE": "--json measured.json", r"\bFILE\b": "benchmarks/ratios.json"},
    ),
    Scaled(pattern=r"(MLOMAE_FUZZ=\d+ )?(\.venv/bin/)?pytest\b.*", more=f"{_COLLECT} tests/architecture"),
    Parsed(pattern=r"python benchmarks/gpu\.py.*", parse=parsers.gpu, why="needs a GPU, or minutes"),
    Parsed(
        pattern=r"PYTHONPATH=\.venv-peers python -m benchmarks\.peers\.betty_peer .*",
        parse=parsers.peer, why="needs betty-ml, whose folder is downloaded",
    ),
)  # fmt: skip


def find_rule(command: Command) -> Rule | None:
    """The first rule that a command fits."""
    fitting = (rule for rule in RULES if re.fullmatch(rule.pattern, command.text, re.DOTALL))
    return next(fitting, None)


def rule_of(command: Command) -> Rule:
    """The first rule that a command fits.

    Raises:
        AssertionError: there is none.
    """
    rule = find_rule(command)
    assert rule is not None, (
        f"{command.place}: no rule says how to execute this command: {command.text}\n"
        "Add one to RULES in tests/docs/rules.py: Rule (as it stands), Scaled (made small) or Parsed."
    )
    return rule


def concrete(command: Command, rule: Rule) -> str:
    """The command with everything that a reader has to replace replaced."""
    text = command.text
    for pattern, word in {**rule.instead, **INSTEAD}.items():
        text = re.sub(pattern, word, text)
    return text
