"""``mlomae report RUN…``: from run directories to one file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from mlomae.arguments import EXIT_OK, Parser
from mlomae.errors import UserError

NAME = "report.html"


def main(words: Sequence[str]) -> int:
    """Writes the page and prints where it is; returns the exit code.

    Raises:
        UserError: a folder is no run directory, something in it is damaged, or the page cannot be written.
    """
    known = _parser().parse_args(words)
    # Imported late: --help and misuse answer at once.
    from mlomae.report.page import render
    from mlomae.report.reading import read_runs
    from mlomae.run_dir import write_atomically

    runs = read_runs(known.runs)
    out = known.out or runs[0].path / NAME
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; give a file, such as {out / NAME}")
    page = render(runs)
    try:
        write_atomically(out, page)
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror})") from None
    print(f"report: {out} ({len(page) / 1e6:.1f} MB)")
    return EXIT_OK


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlomae report",
        description="Writes one HTML page about one or several runs, finished or not: curves, how the mask "
        "developed, what it removes where, evaluations, configurations. The page needs no network and no "
        "other file.",
        examples=("mlomae report runs/digits", "mlomae report runs/learned runs/random --out compared.html"),
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run directory")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help=f"the page (default: {NAME} in the first RUN)"
    )
    return parser
