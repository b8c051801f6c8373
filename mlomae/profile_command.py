"""``mlomae profile RUN | --config FILE``: where the time of an outer iteration goes."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from mlomae.arguments import EXIT_OK, Parser, positive
from mlomae.config_arguments import run_or_recipe
from mlomae.errors import UserError


def main(argv: Sequence[str]) -> int:
    """Prints the tables and writes the trace; returns the exit code.

    Raises:
        UserError: bad input, or a file cannot be written.
    """
    run, known, config = run_or_recipe("profile", _parser(), argv)
    if known.deepspeed_config not in (None, "no"):
        given = known.deepspeed_config
        raise UserError(f"--deepspeed_config {given}: profile runs plain torch engines only; leave it out")
    trace = known.trace or (run or Path()) / "profile.json.gz"
    # Imported late: --help and misuse answer at once.
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


def _parser() -> Parser:
    parser = Parser(
        prog="mlomae profile",
        usage="mlomae profile RUN | --config FILE [options]",
        description="Shows where the time of an outer iteration goes, after the last checkpoint of a run or "
        "at the beginning of a recipe: by part, by kind of operation, and the most expensive operators. "
        "Nothing in the run directory changes but the trace. Every other field of the configuration is a "
        "flag, as in train.",
        examples=(
            "mlomae profile runs/digits",
            "mlomae profile --config digits --iterations 10 --plot timeline.png",
        ),
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
