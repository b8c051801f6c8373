"""``mlomae export ENCODER --to FORMAT --out PATH``: weights for other libraries, with a model card."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlomae.arguments import EXIT_OK, Parser
from mlomae.errors import UserError
from mlomae.interop.targets import TARGETS

if TYPE_CHECKING:
    from mlomae.interop.pretrained import Pretrained


def main(argv: Sequence[str]) -> int:
    """Writes the export and its model card, and prints where they are.

    Raises:
        UserError: the weights cannot be read, the format cannot hold them, or something is at ``--out``.
    """
    known = _parser().parse_args(argv)
    # Imported late: --help and misuse answer at once.
    from mlomae.interop.reading import read_pretrained

    _check_out(known.to, known.out)
    export(read_pretrained(known.encoder), known.to, known.out)
    print(f"{known.to}: {known.out}")
    print(f"card: {card_path(known.out, known.to)}")
    return EXIT_OK


def export(pretrained: Pretrained, to: str, out: Path) -> None:
    """Prepares everything in a hidden folder beside ``out`` and puts it in place at the end.

    Args:
        to: a key of ``TARGETS``.

    Raises:
        UserError: see ``main``; nothing is left then.
    """
    from mlomae.interop.card import model_card
    from mlomae.interop.formats import WRITERS

    _check_out(to, out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".mlomae-export-") as folder:
            staged = Path(folder) / out.name
            WRITERS[to](pretrained, staged)
            text = model_card(pretrained, TARGETS[to], out.name)
            card_path(staged, to).write_text(text)
            # The file itself last: what belongs to it is there by then.
            parts = sorted(Path(folder).iterdir(), key=lambda path: path == staged)
            _refuse_existing(*(out.parent / path.name for path in parts))
            for path in parts:
                os.rename(path, out.parent / path.name)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror or error})") from None


def card_path(out: Path, to: str) -> Path:
    """README.md in a folder; beside a file, which may have others of other formats beside it, NAME.md."""
    return out / "README.md" if TARGETS[to].folder else out.with_name(f"{out.name}.md")


def _check_out(to: str, out: Path) -> None:
    suffix = TARGETS[to].suffix
    if suffix and out.suffix != suffix:
        raise UserError(f"--out {out}: expected the name of a file that ends in {suffix}")
    _refuse_existing(out, card_path(out, to))


def _refuse_existing(*paths: Path) -> None:
    for path in paths:
        if path.exists():
            raise UserError(f"--out: {path} is there already; choose another name, or remove it")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlomae export",
        usage="mlomae export ENCODER --to FORMAT --out PATH",
        description="Writes an encoder for other libraries, with a model card (docs/interop.md). formats:\n"
        + "\n".join(f"  {name:<7} {target.title}" for name, target in TARGETS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        examples=(
            "mlomae export runs/digits --to timm --out digits-timm",
            "mlomae export runs/digits --to onnx --out digits.onnx",
        ),
    )
    parser.add_argument(
        "encoder", type=Path, metavar="ENCODER", help="run directory, or file or folder with weights"
    )
    parser.add_argument("--to", required=True, choices=list(TARGETS), metavar="FORMAT")
    parser.add_argument("--out", required=True, type=Path, metavar="PATH", help="file or folder to write")
    return parser
