"""Runs parts in processes of their own: side by side while they prepare, one by one while they measure.

Compiling a model takes minutes of a processor and hardly any of the GPU, so that parts prepare together, as
many as the device's memory holds (a wave). Nothing is measured while anything prepares. A part that
fails, hangs or takes the GPU's context with it leaves the others alone.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu_parts.catalogue import Part, next_wave
from benchmarks.gpu_parts.files import read_json
from benchmarks.gpu_parts.job import READY, RESULT, Order, order_file

SCRIPT = Path(__file__).resolve().parents[1] / "gpu.py"
ROOT = SCRIPT.parents[1]
_POLL = 0.1
# A part looks at the clock itself between its pieces; this long after its time it is ended.
GRACE = 5.0
# Less is not worth a start.
LEAST = 20.0
# Of what is left when a wave begins, this is kept for those that are ready in time.
_SHARE_TO_MEASURE = 0.3
_TO_SAY_WHERE, _TO_END = 0.5, 10.0
_LINES_OF_LOG = 40

Result = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What all parts share.

    Attributes:
        device: cuda or cpu.
        smoke, quick, out, stamp: see ``job.Order``.
        end: when everything has to be over, in seconds since the epoch.
        gigabytes: device memory that parts may take together.
        processes: that prepare at once.
        scratch: empty folder for what the processes leave.
    """

    device: str
    smoke: bool
    quick: bool
    out: Path
    stamp: str
    end: float
    gigabytes: float
    processes: int
    scratch: Path


def conduct(parts: Sequence[Part], setting: Setting, finished: Callable[[Part, Result], None]) -> None:
    """Runs the parts, the first ones first.

    Args:
        finished: is called with the result of each part as soon as there is one.
    """
    waiting, told = list(parts), set()
    reason = "the benchmark was stopped"

    def tell(part: Part, result: Result) -> None:
        told.add(part.name)
        finished(part, result)

    try:
        while waiting and (left := setting.end - time.time()) > LEAST:
            wave = next_wave(waiting, setting.gigabytes, setting.processes)
            waiting = [part for part in waiting if part not in wave]
            # Nobody waits for what the last ones leave over; those that are ready must not wait for ever.
            spare = 0.0 if waiting else left - sum(part.measure for part in wave)
            _run_wave(wave, setting, tell, spare, most=(1 - _SHARE_TO_MEASURE) * left)
        reason = "no time was left"
    finally:
        for part in parts:
            if part.name not in told:
                finished(part, empty_result("not started", reason))


def empty_result(status: str, reason: str) -> Result:
    """A result without content."""
    return {
        "status": status, "reason": reason, "seconds": {},
        "tables": {}, "bars": [], "notes": [], "failures": [],
    }  # fmt: skip


def _run_wave(
    wave: Sequence[Part],
    setting: Setting,
    finished: Callable[[Part, Result], None],
    spare: float,
    most: float,
) -> None:
    """Prepares the parts together, then lets one after the other measure.

    Args:
        spare: seconds that any part may take to prepare, where its own are fewer.
        most: seconds that none may pass.
    """
    processes: list[_Process] = []
    told: set[str] = set()

    def tell() -> None:
        for process in processes:
            if process.ended and process.part.name not in told:
                told.add(process.part.name)
                finished(process.part, process.result())

    try:
        for part in wave:
            until = time.time() + min(max(part.prepare, spare), most)
            processes.append(_Process(part, setting, until, len(wave)))
        while any(not process.ready and not process.ended for process in processes):
            for process in processes:
                if not process.ready:
                    process.end_if_late("still preparing")
            tell()
            time.sleep(_POLL)
        for process in processes:
            process.go(min(time.time() + process.part.measure, setting.end))
            while not process.ended:
                process.end_if_late("still measuring")
                time.sleep(_POLL)
            tell()
    finally:
        for process in processes:
            process.stop("the benchmark was stopped")
        tell()


class _Process:
    """One part at work."""

    def __init__(self, part: Part, setting: Setting, until: float, beside: int) -> None:
        self.part = part
        self._folder = setting.scratch / part.name
        self._folder.mkdir()
        self._until = until
        self._reason: str | None = None
        self._killed = False
        order_file(
            self._folder,
            Order(
                name=part.name,
                module=part.module,
                argument=part.argument,
                device=setting.device,
                smoke=setting.smoke,
                quick=setting.quick,
                until=self._until,
                end=setting.end,
                out=str(setting.out),
                stamp=setting.stamp,
            ),
        )
        self._log = self._folder / "log.txt"
        with open(self._log, "wb") as log:
            self._popen = subprocess.Popen(
                [sys.executable, str(SCRIPT), "--child", str(self._folder)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=_environment(setting, beside),
                # A group of its own, so that the compiler's processes end with it.
                process_group=0,
            )

    @property
    def ready(self) -> bool:
        return (self._folder / READY).exists()

    @property
    def ended(self) -> bool:
        return self._killed or self._popen.poll() is not None

    def go(self, until: float) -> None:
        """Lets a part that is ready measure until then."""
        if self.ended:
            return
        self._until = until
        assert self._popen.stdin is not None
        with suppress(BrokenPipeError):
            self._popen.stdin.write(f"{until}\n".encode())
            self._popen.stdin.close()

    def end_if_late(self, doing: str) -> None:
        """Ends a part whose time is over."""
        if time.time() > self._until + GRACE:
            self.stop(f"{doing} when its time was over")

    def stop(self, reason: str) -> None:
        """Ends the part, if it has not ended, and what it started."""
        if not self.ended:
            self._reason = reason
            # It writes into its log where it is.
            self._popen.send_signal(signal.SIGUSR1)
            time.sleep(_TO_SAY_WHERE)
        with suppress(ProcessLookupError):
            os.killpg(self._popen.pid, signal.SIGKILL)
        # A process may have to wait for the device before it can end; nobody here has to.
        with suppress(subprocess.TimeoutExpired):
            self._popen.wait(_TO_END)
        self._killed = True
        if self._popen.stdin is not None:
            with suppress(BrokenPipeError):
                self._popen.stdin.close()

    def result(self) -> Result:
        """What the part left; says so where it did not come to its own end."""
        result = read_json(self._folder / RESULT) or empty_result("preparing", "")
        if self._reason is not None:
            result |= {"status": "out of time", "reason": self._reason}
        elif result["status"] in ("preparing", "ready", "measuring"):
            code = self._popen.returncode
            died = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            result |= {"status": "failed", "reason": f"the process ended with {died} ({result['status']})"}
        if result["status"] not in ("done", "skipped"):
            lines = self._log.read_text(errors="replace").splitlines()
            result["log"] = [line[:300] for line in lines[-_LINES_OF_LOG:]]
        return result


def _environment(setting: Setting, beside: int) -> dict[str, str]:
    # Neither the hub nor the interpreter of kernels belongs into a measurement.
    settings = {**os.environ, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    settings.pop("TRITON_INTERPRET", None)
    threads = max(1, 2 * (os.cpu_count() or 1) // beside)
    settings.setdefault("TORCHINDUCTOR_COMPILE_THREADS", str(threads))
    if setting.device == "cpu":
        settings |= {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    return settings
