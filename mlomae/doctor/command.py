"""``mlomae doctor``: checks what a run needs, from Python to the disk, and says what to do."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from mlomae.arguments import EXIT_OK, EXIT_PROBLEMS, Parser
from mlomae.doctor.checks import Check
from mlomae.errors import UserError


def main(words: Sequence[str]) -> int:
    """Prints the report; returns the exit code (0 all right, 1 problems found).

    Raises:
        UserError: bad input.
    """
    known = _parser().parse_args(words)
    if known.dir.exists() and not known.dir.is_dir():
        raise UserError(f"--dir {known.dir}: is a file; give the folder of the runs")
    # Imported late: --help and misuse answer at once.
    from mlomae.doctor.view import show, watch

    results = watch(all_checks(known.dir))
    if known.json:
        print(json.dumps([asdict(result) for result in results], indent=2))
    else:
        show(results)
    return EXIT_PROBLEMS if any(result.status == "problem" for result in results) else EXIT_OK


def all_checks(folder: Path) -> Iterator[Check]:
    """In the order of the report; torch is loaded on the way, not before.

    Args:
        folder: of the runs.
    """
    from mlomae.doctor.devices import device_checks
    from mlomae.doctor.operators import operator_checks
    from mlomae.doctor.processes import process_checks
    from mlomae.doctor.software import software_checks
    from mlomae.doctor.storage import storage_checks

    yield from software_checks()
    yield from device_checks()
    yield from operator_checks()
    yield from process_checks()
    yield from storage_checks(folder)


def _parser() -> Parser:
    parser = Parser(
        prog="mlomae doctor",
        description="Checks what a run needs: versions, devices, every operator by everything that computes "
        "it, sums over real processes, memory and disk. Each line says ok, problem or absent (something "
        "optional); problems come with a fix. Takes some seconds. Exit code 1: there is a problem.",
        examples=("mlomae doctor", "mlomae doctor --dir /scratch/runs", "mlomae doctor --json > doctor.json"),
    )
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of the table")
    parser.add_argument(
        "--dir", type=Path, default=Path("runs"), metavar="DIR", help="folder of the runs (default: runs)"
    )
    return parser
