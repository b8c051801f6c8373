"""With what the runs were computed: configuration, machine, software."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mlomae.report.figures import ABSENT, Kind, is_number, write
from mlomae.report.reading import Run
from mlomae.report.series import Floats
from mlomae.report.tables import Row, Table, Value


@dataclass(frozen=True)
class Setting:
    """A field of the configuration: its value in each run, and whether these differ."""

    name: str
    values: list[str]
    differs: bool


def settings(runs: Sequence[Run]) -> list[Setting]:
    """All fields of all runs; of a single run, those differ that are not the defaults."""
    names = dict.fromkeys(name for run in runs for name in run.config)
    found = []
    for name in names:
        values = [run.config.get(name) for run in runs]
        compared = [*values, runs[0].defaults.get(name)] if len(runs) == 1 else values
        differs = name != "run_dir" and any(value != compared[0] for value in compared)
        found.append(Setting(name, [_yaml(value) for value in values], differs))
    return found


def _yaml(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def machine_table(runs: Sequence[Run]) -> Table:
    """What each run made of its machine. Medians are those of the log lines."""

    def result(name: str, kind: Kind) -> list[str]:
        values = [(run.result or {}).get(name) for run in runs]
        return [write(value, kind) if is_number(value) else ABSENT for value in values]

    def logged(name: str, kind: Kind, of: Callable[[Floats], Any]) -> list[str]:
        values = [run.scalars[name].finite() if name in run.scalars else np.array([]) for run in runs]
        return [write(float(of(each)), kind) if len(each) else ABSENT for each in values]

    rows = {
        "Training time": result("seconds", Kind.SECONDS),
        "Images/s, whole run": result("images_per_second", Kind.NUMBER),
        "Images/s, median": logged("images_per_second", Kind.NUMBER, np.median),
        "MFU, median": logged("mfu", Kind.SHARE, np.median),
        "Waiting for data, median": logged("data_wait", Kind.SHARE, np.median),
        "Peak memory": logged("memory/peak_bytes", Kind.BYTES, np.max),
        "Skipped steps": logged("skipped_steps", Kind.COUNT, np.max),
        "Returns to a checkpoint": logged("rewinds", Kind.COUNT, np.max),
        "Jumps of a loss": logged("loss_jumps", Kind.COUNT, np.sum),
        "Bad samples": logged("bad_samples", Kind.COUNT, np.max),
        "Attempts (Slurm)": [str(run.attempts) if run.attempts else ABSENT for run in runs],
    }
    for name in dict.fromkeys(name for run in runs for name in run.environment or {}):
        values = [(run.environment or {}).get(name) for run in runs]
        rows[name] = [ABSENT if value is None else _yaml(value) for value in values]
    shown = {label: cells for label, cells in rows.items() if any(cell != ABSENT for cell in cells)}
    table_rows = [Row([Value(label), *map(Value, cells)]) for label, cells in shown.items()]
    return Table("Throughput and environment", ["", *(run.name for run in runs)], table_rows)
