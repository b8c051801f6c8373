"""What ``mlomae study`` can do with a study: carry it out, list it, submit it, tell of it."""

from __future__ import annotations

import hashlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch

from mlomae.arguments import EXIT_OK, EXIT_PROBLEMS
from mlomae.errors import UserError
from mlomae.preemption import Preemption
from mlomae.report.lines import read_object
from mlomae.run_dir import to_json, write_atomically
from mlomae.slurm import submit
from mlomae.study.plan import PlannedRun, Study, load_study, plan_runs
from mlomae.study.plots import draw
from mlomae.study.report import render
from mlomae.study.results import Results, done, gather, load_results
from mlomae.study.schedule import Scheduler

RESULTS, REPORT, RUNS, PLACE = "results.json", "report.md", "runs", "planned.json"


def open_study(file: Path, out: Path | None, slurm: Sequence[str] | None = None) -> OpenStudy:
    """A study file with the folder of its results, by default below ``runs``.

    Args:
        slurm: options of ``mlomae submit``, where its runs go to Slurm.

    Raises:
        UserError: the study is wrong.
    """
    out = out or Path("runs") / file.stem
    study, gpus = load_study(file), _gpus()
    on_gpus = _on_gpus(out, gpus, slurm)
    return OpenStudy(study, plan_runs(study, out / RUNS, on_gpus), out, gpus, on_gpus)


def tell_again(file: Path, out: Path | None) -> int:
    """The report of a results file, whose runs may be gone; returns the exit code.

    Raises:
        UserError: it is no results file, or holds nothing.
    """
    results = load_results(file)
    if not results.rows:
        raise UserError(f"results {file}: hold no finished run")
    out = out or file.parent
    out.mkdir(parents=True, exist_ok=True)
    _report(results, (), out)
    print(f"report: {out / REPORT}")
    return EXIT_OK


@dataclass(frozen=True)
class OpenStudy:
    """A study on this machine; its methods return exit codes.

    Attributes:
        planned: all runs.
        out: receives everything.
        gpus: that this process may use, by their CUDA names.
        on_gpus: whether its runs are planned for GPUs.
    """

    study: Study
    planned: Sequence[PlannedRun]
    out: Path
    gpus: Sequence[str]
    on_gpus: bool

    def carry_out(self, jobs: int | None) -> int:
        """Trains and evaluates what is left, then writes results and report.

        Args:
            jobs: runs at a time; by default one on each GPU, else one.
        """

        def tell(line: str) -> None:
            print(line, flush=True)

        self._keep_place()
        left = self._left()
        try:
            with Preemption():
                scheduler = Scheduler(self.study, jobs or max(1, len(self.gpus)), self.gpus, tell)
                failures = scheduler.run(left)
        finally:
            self._write()
        return EXIT_PROBLEMS if failures else EXIT_OK

    def show(self) -> int:
        """Lists all runs, and which are trained."""
        width = max(len(run.name) for run in self.planned)
        left = {run.name for run in self._left() if not run.trained}
        for run in self.planned:
            state = "" if run.name in left else "trained"
            budgets = ",".join(run.budgets)
            print(
                f"{run.name:<{width}}  {budgets:<11}  {run.pretrain_steps:>9,} steps  "
                f"{run.flops / 1e12:11,.4g} TFLOP  {state}".rstrip()
            )
        total = sum(run.flops for run in self.planned)
        print(f"{len(self.planned)} runs, {total / 1e12:,.4g} TFLOP, evaluations not counted")
        return EXIT_OK

    def submit(self, options: Sequence[str]) -> int:
        """Hands the trainings that are left to Slurm, as a job array; evaluations are left to a later call.

        Args:
            options: of ``mlomae submit``.
        """
        left = [run for run in self._left() if not run.trained]
        sources = {run.source for run in left} & {run.path for run in left}
        for run in (run for run in left if run.source in sources):
            print(f"{run.name}: waits for {run.source}; submit again when that is done")
        ready = [run for run in left if run.source not in sources]
        if not ready:
            print("nothing to submit")
            return EXIT_OK
        self._keep_place()
        lines = "".join(f"{shlex.join(run.flags)}\n" for run in ready).encode()
        # Never one that is there already: tasks read their line whenever they begin or are requeued.
        sweep = self.out / f"sweep-{hashlib.sha256(lines).hexdigest()[:8]}.txt"
        write_atomically(sweep, lines)
        words = ["--config", str(self.study.recipe), "--sweep", str(sweep), "--run-dir", str(self.out / RUNS)]
        return submit.main([*words, *options])

    def _keep_place(self) -> None:
        """Lengths at equal FLOPs depend on the estimators, and these on the device: the first plan counts."""
        self.out.mkdir(parents=True, exist_ok=True)
        write_atomically(self.out / PLACE, to_json({"on_gpus": self.on_gpus}).encode())

    def _left(self) -> list[PlannedRun]:
        """Runs that an earlier results file does not tell of, or that another of these starts from."""
        known = done(self._before())
        left = [run for run in self.planned if run.digest(self.study) not in known]
        wanted = {run.path for run in left} | {run.source for run in left}
        return [run for run in self.planned if run.path in wanted]

    def _before(self) -> Results | None:
        file = self.out / RESULTS
        return load_results(file) if file.exists() else None

    def _write(self) -> None:
        """Results and report of what is finished, if anything is."""
        results, file = gather(self.study, self.planned, self._before()), self.out / RESULTS
        if not results.rows:
            return
        write_atomically(file, results.dump().encode())
        _report(results, self.planned, self.out)
        print(f"results: {file} ({len(results.rows)} of {results.planned} runs); report: {self.out / REPORT}")


def _report(results: Results, planned: Sequence[PlannedRun], out: Path) -> None:
    write_atomically(out / REPORT, render(results, draw(results, planned, out)).encode())


def _gpus() -> list[str]:
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return [name for name in named.split(",") if name][:count] if named else [str(n) for n in range(count)]


def _on_gpus(out: Path, gpus: Sequence[str], slurm: Sequence[str] | None) -> bool:
    """Whether a study's runs are planned for GPUs: as they were before, else where they will run."""
    before = (read_object(out / PLACE) or {}).get("on_gpus")
    if isinstance(before, bool):
        return before
    if slurm is None:
        return bool(gpus)
    words = " ".join(slurm).replace("=", " ").split()
    return ("--gpus-per-node", "0") not in pairwise(words)
