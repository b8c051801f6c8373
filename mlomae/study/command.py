"""``mlomae study STUDY.yaml``: from a study file to runs, results and a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mlomae.arguments import Parser, positive


def main(words: Sequence[str]) -> int:
    """Runs what is left of a study and writes its results and report; returns the exit code.

    Raises:
        mlomae.errors.UserError: the study, or something in its folder, is wrong.
        mlomae.errors.Preempted: a signal asked to stop.
    """
    parser = _parser()
    known, rest = parser.parse_known_args(words)
    if rest and not known.slurm:
        parser.parse_args(words)  # says what is unknown
    # Imported late: --help and misuse answer at once.
    from mlomae.study import actions

    if known.file.suffix == ".json":
        return actions.tell_again(known.file, known.out)
    study = actions.open_study(known.file, known.out, rest if known.slurm else None)
    if known.slurm:
        return study.submit([*rest, *(["--dry-run"] if known.dry_run else [])])
    if known.dry_run:
        return study.show()
    return study.carry_out(known.jobs)


def _parser() -> Parser:
    parser = Parser(
        prog="mlomae study",
        usage="mlomae study STUDY.yaml [options]",
        description="Pretrains and evaluates every arm of a study with every seed under every budget, skips "
        "what is done, resumes what was begun, and writes results.json, report.md and pictures: means, "
        "standard deviations, paired differences and their confidence intervals. With a results.json in "
        "place of the study only the report is written. See docs/studies.md.",
        examples=(
            "mlomae study benchmarks/studies/digits.yaml --jobs 2",
            "mlomae study benchmarks/studies/cifar10.yaml --dry-run",
            "mlomae study benchmarks/studies/cifar10.yaml --slurm --gpus-per-node 1 --time 8:00:00",
            "mlomae study runs/digits/results.json --out runs/digits-again",
        ),
    )
    parser.add_argument(
        "file", type=Path, metavar="STUDY", help="a study in YAML, or the results of one in JSON"
    )
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="receives everything (default: runs/NAME)")
    parser.add_argument(
        "--jobs", type=positive, metavar="N", help="runs at a time (default: one on each GPU, else one)"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list the runs only; with --slurm, as submit does"
    )
    parser.add_argument(
        "--slurm", action="store_true",
        help="submit what is left to train as a job array; other options go to `mlomae submit`",
    )  # fmt: skip
    return parser
