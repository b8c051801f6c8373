"""A part from the inside: what it is told, what it finds, and how much time it has left.

A part's module has one generator function ``run(job)``. Up to its ``yield`` it prepares (compiles, checks,
warms up) beside other parts; after it the device is its own and it measures. A part without figures of
time need not yield. Whatever the job is given is on the disk at once, so that nothing is lost with the
process.
"""

from __future__ import annotations

import faulthandler
import gc
import importlib
import importlib.util
import json
import math
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_parts.files import write_json

Row = Mapping[str, str | int | float | bool | None]
READY, RESULT, ORDER = "ready", "result.json", "order.json"


@dataclass(frozen=True)
class Order:
    """What a part is told.

    Attributes:
        name, module, argument: see ``catalogue.Part``.
        device: cuda or cpu.
        smoke: run everything once on small shapes; figures are left out of the results.
        quick: fewer shapes and variants.
        until: end of the preparation, in seconds since the epoch.
        end: of everything.
        out, stamp: folder of the record's files, and the beginning of their names.
    """

    name: str
    module: str
    argument: str
    device: str
    smoke: bool
    quick: bool
    until: float
    end: float
    out: str
    stamp: str


class Skipped(Exception):
    """This part cannot run here, and says why."""


class OutOfTime(Exception):
    """What is left cannot be done in the time that is left."""


class Job:
    """The results of one part, kept in ``result.json`` of its folder."""

    def __init__(self, order: Order, folder: Path) -> None:
        self.smoke, self.quick, self.argument = order.smoke, order.quick, order.argument
        self.device = torch.device(order.device)
        self._order = order
        self._folder = folder
        self._until = order.until
        self._started = time.time()
        self._result: dict[str, Any] = {
            "status": "preparing", "reason": None, "seconds": {},
            "tables": {}, "bars": [], "notes": [], "failures": [],
        }  # fmt: skip
        self._write()

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def file(self, name: str) -> Path:
        """Where a file beside the record belongs."""
        return Path(self._order.out) / f"{self._order.stamp}_{name}"

    def left(self) -> float:
        """Seconds."""
        return self._until - time.time()

    def require(self, seconds: float, what: str) -> None:
        """Raises OutOfTime where less is left."""
        if self.left() < seconds:
            raise OutOfTime(f"{what}: needs about {seconds:.0f} s, {max(self.left(), 0):.0f} s are left")

    def table(self, key: str, title: str, rows: Sequence[Row], shown: bool = True) -> None:
        """Records rows with the same keys; a table of the same key is replaced.

        Args:
            shown: on the screen too.
        """
        kept = [_without_figures(row) for row in rows] if self.smoke else list(rows)
        self._result["tables"][key] = {"title": title, "shown": shown, "rows": kept}
        self._write()

    def bar(self, what: str, value: float | None, relation: str, bound: float, timed: bool = True) -> None:
        """Records a figure that has to be reached.

        Args:
            value: None where it could not be measured.
            timed: a smoke run judges nothing that was.
        """
        judged = not (self.smoke and timed)
        found = value if judged and value is not None and math.isfinite(value) else None
        met = None
        if judged:
            met = found is not None and (found <= bound if relation == "<=" else found >= bound)
        self._result["bars"].append(
            {"what": what, "value": found, "relation": relation, "bound": bound, "met": met}
        )
        self._write()

    def note(self, text: str) -> None:
        """Records a line."""
        self._result["notes"].append(text)
        self._write()

    def fail(self, what: str, error: str) -> None:
        """Records that a piece of this part went wrong."""
        self._result["failures"].append({"what": what, "error": error})
        self._write()

    @contextmanager
    def attempt(self, what: str, needed: bool = True) -> Iterator[None]:
        """A piece whose failure leaves the others alone.

        Args:
            needed: otherwise, and where a package is absent, the failure is a note.
        """
        try:
            yield
        except (OutOfTime, Skipped):
            raise
        except Exception as error:
            if reason := _absent(error):
                self.note(f"{what}: left out, {reason}")
            elif not needed:
                self.note(f"{what}: {_one_line(error)}")
            else:
                self.fail(what, _one_line(error))
                traceback.print_exc()
            # The frames hold tensors.
            traceback.clear_frames(error.__traceback__)
        else:
            return
        free_memory()

    def run(self) -> int:
        """Does what the order says.

        Returns:
            0; the result is in the file.
        """
        try:
            steps = importlib.import_module(self._order.module).run(self)
            if next(steps, "ended") != "ended":
                self._turn()
                next(steps, None)
            self._end("failed" if self._result["failures"] else "done")
        except OutOfTime as error:
            self._end("out of time", str(error))
        except Skipped as error:
            self._end("skipped", str(error))
        except BaseException as error:
            traceback.print_exc()
            absent = _absent(error)
            self._end("skipped" if absent else "failed", absent or _one_line(error))
        return 0

    def _turn(self) -> None:
        """Waits until nobody else uses the device."""
        free_memory()
        self._result["seconds"]["prepare"] = time.time() - self._started
        self._result["status"] = "ready"
        self._write()
        (self._folder / READY).touch()
        line = sys.stdin.readline()
        if not line.strip():
            raise OutOfTime("prepared, but its turn did not come")
        self._until, self._started = float(line), time.time()
        self._result["status"] = "measuring"
        self._write()

    def _end(self, status: str, reason: str | None = None) -> None:
        half = "measure" if "prepare" in self._result["seconds"] else "prepare"
        self._result["seconds"][half] = time.time() - self._started
        self._result |= {"status": status, "reason": reason}
        self._write()

    def _write(self) -> None:
        write_json(self._folder / RESULT, self._result)


def run_child(folder: Path) -> int:
    """One part in this process, as ``order.json`` in its folder says."""
    order = Order(**json.loads((folder / ORDER).read_text()))
    # For the one who ends this process; should that one be gone, it ends by itself.
    faulthandler.register(signal.SIGUSR1)
    faulthandler.dump_traceback_later(max(order.end + 10 - time.time(), 1), exit=True)
    return Job(order, folder).run()


def order_file(folder: Path, order: Order) -> None:
    """Leaves an order where ``run_child`` looks for it."""
    write_json(folder / ORDER, asdict(order))


def free_memory() -> None:
    """Gives back what nobody holds any more."""
    gc.collect()
    if torch.cuda.is_initialized():
        try:
            torch.cuda.empty_cache()
        except RuntimeError as error:  # a failed kernel: every later call repeats its error
            print(f"memory stays taken: {_one_line(error)}")


def _without_figures(row: Row) -> dict[str, Any]:
    return {name: None if isinstance(cell, float) else cell for name, cell in row.items()}


def _absent(error: BaseException) -> str | None:
    """The reason, if a third-party package that is not installed raised the error."""
    if not isinstance(error, ModuleNotFoundError) or not error.name:
        return None
    package = error.name.partition(".")[0]
    if package in ("torch", "triton", "mlomae", "mlomae_kernels", "benchmarks"):
        return None
    return None if importlib.util.find_spec(package) else f"{package} is not installed"


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {text[:500]}{where}"
