"""``mlomae study STUDY.yaml``: from a study file to runs, results and a report."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from mlomae.arguments import EXIT_OK, EXIT_PROBLEMS, Parser, positive
from mlomae.config import load_config
from mlomae.errors import UserError
from mlomae.run_dir import write_atomically
from mlomae.study.plan import PlannedRun, Study, in_yaml, load_study, plan_runs
from mlomae.study.results import Results, done, gather, load_results

RESULTS, REPORT, RUNS, SWEEP = "results.json", "report.md", "runs", "sweep.txt"


def main(words: Sequence[str]) -> int:
    """Runs what is left of a study and writes its results and report; returns the exit code.

    Raises:
        UserError: the study, or something in its folder, is wrong.
        mlomae.errors.Preempted: a signal asked to stop.
    """
    known, rest = _parser().parse_known_args(words)
    if rest and not known.slurm:
        _parser().parse_args(words)  # says what is unknown
    if known.file.suffix == ".json":
        return _tell_again(known.file, known.out)
    out = known.out or Path("runs") / known.file.stem
    study = load_study(known.file)
    gpus = _gpus()
    planned = plan_runs(study, out / RUNS, _estimator(study, bool(gpus)))
    if known.slurm:
        return _submit(study, planned, out, [*rest, *(["--dry-run"] if known.dry_run else [])])
    if known.dry_run:
        return _show(study, planned, out)
    return _carry_out(study, planned, out, known.jobs or max(1, len(gpus)), gpus)


def _carry_out(study: Study, planned: Sequence[PlannedRun], out: Path, jobs: int, gpus: Sequence[str]) -> int:
    from mlomae.preemption import Preemption
    from mlomae.study.schedule import Scheduler

    def tell(line: str) -> None:
        print(line, flush=True)

    out.mkdir(parents=True, exist_ok=True)
    left = _left(study, planned, out)
    try:
        with Preemption():
            failures = Scheduler(study, jobs, gpus, tell).run(left)
    finally:
        _write(study, planned, out)
    return EXIT_PROBLEMS if failures else EXIT_OK


def _left(study: Study, planned: Sequence[PlannedRun], out: Path) -> list[PlannedRun]:
    """Runs that an earlier results file does not tell of, or that another of these starts from."""
    known = done(_before(out))
    left = [run for run in planned if run.digest(study) not in known]
    sources = {run.source for run in left}
    return [run for run in planned if run in left or run.path in sources]


def _before(out: Path) -> Results | None:
    return load_results(out / RESULTS) if (out / RESULTS).exists() else None


def _write(study: Study, planned: Sequence[PlannedRun], out: Path) -> None:
    """Results and report of what is finished, if anything is."""
    results = gather(study, planned, _before(out))
    if not results.rows:
        return
    write_atomically(out / RESULTS, results.dump().encode())
    _report(results, planned, out)
    print(f"results: {out / RESULTS} ({len(results.rows)} of {results.planned} runs); report: {out / REPORT}")


def _report(results: Results, planned: Sequence[PlannedRun], out: Path) -> None:
    from mlomae.study.plots import draw
    from mlomae.study.report import render

    write_atomically(out / REPORT, render(results, draw(results, planned, out)).encode())


def _tell_again(file: Path, out: Path | None) -> int:
    """The report of a results file, whose runs may be gone."""
    results = load_results(file)
    if not results.rows:
        raise UserError(f"results {file}: hold no finished run")
    out = out or file.parent
    out.mkdir(parents=True, exist_ok=True)
    _report(results, (), out)
    print(f"report: {out / REPORT}")
    return EXIT_OK


def _show(study: Study, planned: Sequence[PlannedRun], out: Path) -> int:
    """All runs, and which are done."""
    width = max(len(run.name) for run in planned)
    left = {run.name for run in _left(study, planned, out)}
    for run in planned:
        trained = run.name not in left or (run.path / "result.json").exists()
        state = "trained" if trained else ""
        budgets = ",".join(run.budgets)
        print(
            f"{run.name:<{width}}  {budgets:<11}  {run.pretrain_steps:>9,} steps  "
            f"{run.flops / 1e12:11,.4g} TFLOP  {state}".rstrip()
        )
    total = sum(run.flops for run in planned)
    print(f"{len(planned)} runs, {total / 1e12:,.4g} TFLOP, evaluations not counted")
    return EXIT_OK


def _submit(study: Study, planned: Sequence[PlannedRun], out: Path, options: Sequence[str]) -> int:
    """Hands the trainings that are left to Slurm, as a job array; evaluations are left to a later call."""
    from mlomae.slurm import submit

    left = [run for run in _left(study, planned, out) if not (run.path / "result.json").exists()]
    ready = [run for run in left if run.source is None or (run.source / "result.json").exists()]
    for run in (run for run in left if run not in ready):
        print(f"{run.name}: waits for {run.source}; submit again when that is done")
    if not ready:
        print("nothing to submit")
        return EXIT_OK
    lines = [
        shlex.join(
            [word for field, value in run.settings.items() for word in (f"--{field}", value)]
            + ["--run-dir", str(run.path)]
        )
        for run in ready
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / SWEEP, ("\n".join(lines) + "\n").encode())
    words = ["--config", str(study.recipe), "--sweep", str(out / SWEEP), "--run-dir", str(out / RUNS)]
    return submit.main([*words, *options])


def _gpus() -> list[str]:
    """The GPUs that this process may use, by their CUDA names."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [name for name in named.split(",") if name][:count] if named else [str(n) for n in range(count)]


def _estimator(study: Study, on_gpu: bool) -> str | None:
    """Of the influence, where a device decides it."""
    import torch

    from mlomae.precision import resolve_precision

    config = load_config(study.recipe, in_yaml(study.set))
    if config.hypergradient.estimator != "auto":
        return None
    device = torch.device("cuda" if on_gpu and config.device != "cpu" else "cpu")
    return "jvp" if resolve_precision(config.compute.precision, device, None) == "bf16" else "fd"


def _parser() -> Parser:
    parser = Parser(
        prog="mlomae study",
        usage="mlomae study STUDY.yaml [options]",
        description="Pretrains and evaluates every arm of a study with every seed under every budget, skips "
        "what is done, resumes what was begun, and writes results.json, report.md and pictures: means, "
        "standard deviations, paired differences and their confidence intervals. With a results.json in "
        "place of the study only the report is written. See docs/studies.md.",
        examples=(
            "mlomae study studies/digits.yaml --jobs 2",
            "mlomae study studies/cifar10.yaml --dry-run",
            "mlomae study studies/cifar10.yaml --slurm --gpus-per-node 1 --time 8:00:00",
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
