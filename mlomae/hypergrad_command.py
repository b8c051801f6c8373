"""``mlomae hypergrad-check RUN | --config FILE``: every estimator against the exact hypergradient."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mlomae.arguments import EXIT_OK, Parser, positive
from mlomae.config_arguments import run_or_recipe


def main(argv: Sequence[str]) -> int:
    """Prints the comparison and draws it; returns the exit code.

    Raises:
        mlomae.errors.UserError: bad input.
    """
    run, known, config = run_or_recipe("hypergrad-check", _parser(), argv)
    # Imported late: --help and misuse answer at once.
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


def _parser() -> Parser:
    parser = Parser(
        prog="mlomae hypergrad-check",
        usage="mlomae hypergrad-check RUN | --config FILE [options]",
        description="Compares every estimator of the hypergradient with the exact one, at the last "
        "checkpoint of a run or at the beginning of a recipe: cosine, relative error, time and memory. "
        "Every field of the configuration is a flag, as in train.",
        examples=(
            "mlomae hypergrad-check runs/digits",
            "mlomae hypergrad-check --config digits --images 8 --plot error.png",
        ),
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
