"""The runs of a study on the machine at hand: several at a time, each in processes of its own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from mlomae.errors import UserError
from mlomae.run_dir import RunDir, Status
from mlomae.study.plan import PlannedRun, Study


def commands(study: Study, run: PlannedRun) -> Iterator[list[str]]:
    """Words after ``mlomae`` of what is still to be done for a run, one command at a time.

    Raises:
        UserError: its folder holds a run with other settings.
    """
    if RunDir(run.path, run.config).claim(primary=False) is not Status.COMPLETE:
        yield ["train", "--config", str(study.recipe), *run.flags]
    for task, evaluation in study.evaluations_of(run.arm).items():
        if not (evaluation.folder(task, run.path) / "result.json").exists():
            yield evaluation.words(task, run.path)


class Scheduler:
    """Carries out what is left of a study.

    Args:
        jobs: runs at a time.
        gpus: the GPUs to spread them over, as CUDA numbers them; none for the CPU.
        tell: is given a line for each run that had something left to do.
    """

    def __init__(self, study: Study, jobs: int, gpus: Sequence[str], tell: Callable[[str], None]) -> None:
        self._study, self._jobs, self._tell = study, jobs, tell
        self._free: SimpleQueue[str | None] = SimpleQueue()
        for number in range(jobs):
            self._free.put(gpus[number % len(gpus)] if gpus else None)
        self._stopping = threading.Event()
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, runs: Sequence[PlannedRun]) -> dict[str, str]:
        """Trains and evaluates; a failure ends its run and those that start from it.

        Args:
            runs: sources before those that start from them.

        Returns:
            Why runs failed, by their names.

        Raises:
            BaseException: of a signal in this process; the runs were told to save, and have ended.
        """
        futures: dict[Path, Future[str | None]] = {}
        with ThreadPoolExecutor(self._jobs) as pool:
            try:
                for number, run in enumerate(runs, start=1):
                    # Runs start in this order: the one that this waits for is done or on its way.
                    source = None if run.source is None else futures[run.source]
                    futures[run.path] = pool.submit(self._settle, run, source, f"[{number}/{len(runs)}]")
                reasons = {run.name: futures[run.path].result() for run in runs}
            except BaseException:
                self._stopping.set()
                pool.shutdown(wait=False, cancel_futures=True)
                for process in list(self._running):
                    process.send_signal(signal.SIGTERM)
                raise
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def _settle(self, run: PlannedRun, source: Future[str | None] | None, place: str) -> str | None:
        """One run; returns why it failed."""
        if source is not None and source.result() is not None:
            lacks = f"starts from {run.source}, which has no encoder"
            if not self._stopping.is_set():
                self._tell(f"{place} {run.name}: {lacks}")
            return lacks
        gpu, done = self._free.get(), False
        try:
            for words in commands(self._study, run):
                if self._stopping.is_set():
                    return "stopped"
                reason = self._call(words, run, gpu)
                if self._stopping.is_set():
                    return "stopped"
                if reason is not None:
                    self._tell(f"{place} {run.name}: failed: {reason}")
                    return reason
                done = True
        except UserError as error:
            self._tell(f"{place} {run.name}: {error}")
            return str(error)
        finally:
            self._free.put(gpu)
        if done:
            self._tell(f"{place} {run.name}: done")
        return None

    def _call(self, words: Sequence[str], run: PlannedRun, gpu: str | None) -> str | None:
        """One command of a run; returns why it failed."""
        # Beside the folder, which belongs to the run alone.
        log = run.path.with_name(f"{run.path.name}.log")
        log.parent.mkdir(parents=True, exist_ok=True)
        threads = max(1, (os.cpu_count() or 1) // self._jobs)
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        if gpu is not None:
            environment["CUDA_VISIBLE_DEVICES"] = gpu
        with log.open("ab") as output:
            start = output.tell()
            process = subprocess.Popen(
                [sys.executable, "-m", "mlomae", *words], stdout=output, stderr=output, env=environment
            )
            self._running.add(process)
            code = process.wait()
            self._running.discard(process)
        if not code:
            return None
        last = log.read_bytes()[start:].decode(errors="replace").strip().rpartition("\n")[2]
        return f"{words[0]} ended with {code}: {last.removeprefix('mlomae: error: ')} (see {log})"
