"""``mlomae recipes``: lists the recipes; ``mlomae recipes show NAME`` prints one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mlomae.arguments import EXIT_OK, Parser
from mlomae.recipes import recipes


def main(words: Sequence[str]) -> int:
    """Prints the list, or a recipe; returns the exit code.

    Raises:
        mlomae.errors.UserError: there is no recipe of that name.
    """
    found = recipes()
    known = _parser(list(found)).parse_args(words)
    if known.command == "show":
        print(found[known.name].read_text(), end="")
        return EXIT_OK
    width = max(map(len, found), default=0)
    for name, path in found.items():
        print(f"{name:<{width}}  {first_sentence(path)}")
    return EXIT_OK


def first_sentence(path: Path) -> str:
    """Of a recipe's leading comment."""
    comment: list[str] = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.lstrip("# "))
    # The full stop of "et al." ends no sentence.
    return re.split(r"(?<=\.)(?<! al\.)\s+", " ".join(comment), maxsplit=1)[0]


def _parser(names: list[str]) -> Parser:
    parser = Parser(
        prog="mlomae recipes",
        description="Lists the recipes that come with the project: their names, which --config takes, and "
        "what they are for.",
        examples=(
            "mlomae recipes",
            "mlomae recipes show digits",
            "mlomae recipes show finetune/cifar10 > mine.yaml",
        ),
    )
    commands = parser.add_subparsers(dest="command", metavar="show")
    show = commands.add_parser(
        "show",
        help="print a recipe",
        description="Prints a recipe.",
        examples=("mlomae recipes show digits",),
    )
    show.add_argument("name", choices=names, metavar="NAME", help="as `mlomae recipes` lists it")
    return parser
