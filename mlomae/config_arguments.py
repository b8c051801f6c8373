"""Fields of a configuration on the command line: ``--section.field value``."""

from __future__ import annotations

import argparse
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from mlomae.arguments import Parser, nearest
from mlomae.config import Config, load_config, load_run
from mlomae.errors import UserError
from mlomae.run_dir import to_json
from mlomae.sections import Display, Section


@dataclass(frozen=True)
class Flag:
    """A field as it is given on the command line.

    Attributes:
        name: dotted, without dashes.
        kind: its annotation.
        description: of the field; empty where it has none.
    """

    name: str
    kind: Any
    default: Any
    description: str

    @property
    def choices(self) -> tuple[str, ...]:
        """The words that it accepts; a field of two kinds may accept other values beside them."""
        if self.kind is bool:
            return "true", "false"
        kinds = [self.kind, *get_args(self.kind)]
        return tuple(str(word) for kind in kinds if get_origin(kind) is Literal for word in get_args(kind))


def flags(root: type[Section], prefix: str = "") -> Iterator[Flag]:
    """Every field of a tree, in its order."""
    for name, field in root.model_fields.items():
        default: Any = field.default
        kinds = [kind for kind in get_args(field.annotation) if isinstance(kind, type)]
        if default is None and kinds and issubclass(kinds[0], Section):
            default = kinds[0]()
        if isinstance(default, Section):
            yield from flags(type(default), f"{prefix}{name}.")
        else:
            yield Flag(f"{prefix}{name}", field.annotation, default, field.description or "")


def describe(root: type[Section]) -> list[str]:
    """One line a field: name, default, choices or description; an empty one between sections."""
    lines, section = [], ""
    for flag in flags(root):
        if flag.name.rpartition(".")[0] != section:
            section = flag.name.rpartition(".")[0]
            lines.append("")
        text = flag.description or (" | ".join(flag.choices) if get_origin(flag.kind) is Literal else "")
        lines.append(f"  --{flag.name:<28} {flag.default!s:<12} {text}".rstrip())
    return lines


def overrides(rest: Sequence[str], switches: Collection[str] = ()) -> dict[str, str]:
    """['--pretrain.lr', '1e-4', '--run-dir=x'] → {'pretrain.lr': '1e-4', 'run_dir': 'x'}.

    Args:
        switches: fields that are true where their flag stands alone.

    Raises:
        UserError: a word that is no flag, or no value of one.
    """
    fields: dict[str, str] = {}
    words = deque(rest)
    while words:
        word = words.popleft()
        name, equals, value = word[2:].partition("=")
        if not word.startswith("--") or not name:
            raise UserError(f"argument {word!r}: expected --section.field value")
        field = name.replace("-", "_")
        if not equals and words and not words[0].startswith("--"):
            value = words.popleft()
        elif not equals and field in switches:
            value = "true"
        elif not equals:
            raise UserError(f"--{name}: no value given")
        fields[field] = value
    return fields


def add_display_flags(parser: Parser) -> None:
    """``--quiet`` and ``--json``, short for values of the field ``display``."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument(
        "--quiet", dest="display", action="store_const", const="quiet", help="the result and errors only"
    )
    group.add_argument(
        "--json", dest="display", action="store_const", const="json",
        help="each log line and the result as a JSON object on a line",
    )  # fmt: skip


def show_result(result: Mapping[str, Any], display: Display) -> None:
    """The figures of a run on standard output; nothing where there are none, as on other ranks."""
    if display != "json":
        for name, value in result.items():
            print(f"{name}: {value}")
    elif result:
        print(to_json(result))


def parse_known(
    parser: Parser, argv: Sequence[str], root: type[Section] = Config
) -> tuple[argparse.Namespace, dict[str, str]]:
    """The command's own options, and the fields that are given beside them.

    Raises:
        UserError: misuse, or see ``refuse_typos``.
    """
    known, rest = parser.parse_known_args(argv)
    refuse_typos(parser, rest, root)
    fields = overrides(rest, {flag.name for flag in flags(root) if flag.kind is bool})
    if getattr(known, "display", None) is not None:
        fields["display"] = known.display
    return known, fields


def refuse_typos(parser: Parser, rest: Sequence[str], root: type[Section] = Config) -> None:
    """Tells options from fields in what a parser left over.

    Raises:
        UserError: a flag is no field, but resembles one of the parser's options.
    """
    own = {flag[2:].replace("-", "_"): flag for flag in parser.flags if flag.startswith("--")}
    for word in rest:
        typed = word.partition("=")[0]
        name = typed[2:].replace("-", "_")
        if word.startswith("--") and "." not in name and name not in root.model_fields:
            near = nearest(name, [*own, *root.model_fields])
            if near in own:
                raise UserError(f"{typed}: unknown; did you mean {own[near]!r}?")


def run_or_recipe(
    command: str, parser: Parser, argv: Sequence[str]
) -> tuple[Path | None, argparse.Namespace, Config]:
    """The run directory, if that is the first word; the command's own options; the configuration."""
    # First of all words: later ones may be values of fields, which the parser does not know.
    run = Path(argv[0]) if argv and not argv[0].startswith("-") else None
    known, fields = parse_known(parser, argv if run is None else argv[1:])
    if (run is None) == (known.config is None):
        raise UserError(f"{command}: give a run directory or --config FILE; see {command} --help")
    return run, known, load_config(known.config, fields) if run is None else load_run(run, fields)
