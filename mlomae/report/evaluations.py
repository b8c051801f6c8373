"""What the runs are worth: figures at their end, means over seeds, and later evaluations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import PurePath
from statistics import fmean, stdev
from typing import Any

from mlomae.config import RESUMABLE_CHANGES
from mlomae.report.figures import ABSENT, NAMES, Kind, is_number, name_of, write
from mlomae.report.reading import Run
from mlomae.report.tables import Row, Table, Value

# Of an evaluation's line, beside its figures.
_ABOUT = ("time", "out", "task", "encoder", "scratch", "policy", "seed")
_TASKS = {
    "knn": "k-NN on frozen features",
    "linear": "Linear probe on frozen features",
    "finetune": "Fine-tuning",
    "segment": "Segmentation",
    "detect": "Detection",
}
# Neither what may differ between repetitions, nor what a machine decides.
_NO_SETTING = {*RESUMABLE_CHANGES, "seed"} - {"data.path", "data.test_path"}


def result_table(runs: Sequence[Run]) -> Table | None:
    """What finished runs scored at their end, and how far that is from a random mask on the same data."""
    finished = [(number, run, run.result) for number, run in enumerate(runs) if run.result is not None]
    if not finished:
        return None
    columns = _fields(result for _, _, result in finished)
    rows = []
    for number, run, result in finished:
        base = _baseline(run, runs)
        about = [Value(run.name, run.name), Value(run.policy, run.policy), _seed(run)]
        cells = [_figure(name, result.get(name), column, base.get(name)) for name, column in columns.items()]
        rows.append(Row([*about, *cells], number))
    compared = any(cell.change for row in rows for cell in row.cells)
    note = (
        "Small: difference to a random mask on the same data, of the same seed if there is one, in "
        "percentage points."
    )
    titles = ["Run", "Mask", "Seed", *(name_of(name).text for name in columns)]
    return Table("At the end of training", titles, rows, note if compared else "")


def _baseline(run: Run, runs: Sequence[Run]) -> dict[str, Any]:
    """The result of a run with random masks to compare with; empty if there is none."""
    if run.policy == "random":
        return {}

    def data(of: Run) -> dict[str, Any]:
        names = {name for name in of.config if name.startswith("data.")} - _NO_SETTING
        return {name: of.config[name] for name in names}

    found = [
        other for other in runs if other.policy == "random" and other.result and data(other) == data(run)
    ]
    found.sort(key=lambda other: other.config["seed"] != run.config["seed"])
    return (found[0].result or {}) if found else {}


def seed_table(runs: Sequence[Run]) -> Table | None:
    """Means over finished runs that differ in nothing but the seed; None where no two do."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.result is not None:
            setting = {name: value for name, value in run.config.items() if name not in _NO_SETTING}
            groups.setdefault(json.dumps(setting, default=str, sort_keys=True), []).append(run)
    repeated = [group for group in groups.values() if len({run.config["seed"] for run in group}) > 1]
    fields = [
        name
        for name in _fields(run.result or {} for group in repeated for run in group)
        if name_of(name).kind is Kind.SHARE
    ]
    if not fields:
        return None
    rows = []
    # A seed that was run again is no other seed: the last one given counts.
    for group in (list({run.config["seed"]: run for run in group}.values()) for group in repeated):
        names, policy = ", ".join(run.name for run in group), group[0].policy
        columns = _fields(run.result or {} for run in group)
        cells = [_mean([value for value in columns.get(name, []) if is_number(value)]) for name in fields]
        rows.append(Row([Value(policy, policy), Value(names, names), _count(len(group)), *cells]))
    titles = ["Mask", "Runs", "Seeds", *(name_of(name).text for name in fields)]
    return Table("Mean over seeds", titles, rows, "± standard deviation between seeds.")


def evaluation_tables(runs: Sequence[Run]) -> list[tuple[Table, Table | None]]:
    """For each task its evaluations, and their figures by class where there are any."""
    by_task: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for number, run in enumerate(runs):
        for row in run.evaluations:
            by_task.setdefault(str(row.get("task")), []).append((number, row))
    order = sorted(by_task, key=lambda task: [*_TASKS, task].index(task))
    return [(_task_table(runs, task, by_task[task]), _class_table(runs, by_task[task])) for task in order]


def _task_table(runs: Sequence[Run], task: str, rows: Sequence[tuple[int, dict[str, Any]]]) -> Table:
    columns = {name: values for name, values in _fields(row for _, row in rows).items() if "/" not in name}
    table_rows = []
    for number, row in rows:
        moment = str(row.get("time", ""))[:16].replace("T", " ")
        about = [Value(text, text) for text in (runs[number].name, _start(row), _folder(row), moment)]
        cells = [_figure(name, row.get(name), column) for name, column in columns.items()]
        table_rows.append(Row([*about, *cells], number))
    titles = ["Run", "Encoder", "Folder", "Finished (UTC)", *(name_of(name).text for name in columns)]
    return Table(_TASKS.get(task, task), titles, table_rows)


def _class_table(runs: Sequence[Run], rows: Sequence[tuple[int, dict[str, Any]]]) -> Table | None:
    """Rows: classes; columns: evaluations."""
    fields = dict.fromkeys(name for _, row in rows for name in row if "/" in name)
    if not fields:
        return None
    titles = [f"{runs[number].name}, {_start(row)}, {_folder(row)}" for number, row in rows]
    table_rows = []
    for name in fields:
        values = [row.get(name) for _, row in rows]
        label = name.split("/", 1)[1]
        cells = [_figure(name, value, values) for value in values]
        table_rows.append(Row([Value(label, label), *cells]))
    return Table("By class", ["Class", *titles], table_rows)


def _fields(rows: Iterable[dict[str, Any]]) -> dict[str, list[Any]]:
    """The figures of some rows, known ones first, each with the values of all rows."""
    collected = list(rows)
    names = dict.fromkeys(
        name for row in collected for name, value in row.items() if is_number(value) and name not in _ABOUT
    )
    known = [name for name in NAMES if name in names]
    tail = [name for name in known if NAMES[name].better is None]
    rest = [name for name in names if name not in NAMES]
    head = [name for name in known if name not in tail]
    return {name: [row.get(name) for row in collected] for name in (*head, *rest, *tail)}


def _figure(name: str, value: Any, column: Sequence[Any], base: Any = None) -> Value:
    if not is_number(value):
        return Value(ABSENT)
    naming = name_of(name)
    numbers = {number for number in column if is_number(number)}
    extreme = None if naming.better is None else max(numbers) if naming.better else min(numbers)
    change = ""
    if naming.kind is Kind.SHARE and is_number(base):
        points = 100 * (value - base)
        change = f"{points:+.2f}".replace("-", "\N{MINUS SIGN}")
    digits = 2 if naming.kind is Kind.SHARE else None
    return Value(write(value, naming.kind, digits), value, len(numbers) > 1 and value == extreme, change)


def _mean(values: Sequence[float]) -> Value:
    if not values:
        return Value(ABSENT)
    mean = fmean(values)
    spread = f" ± {100 * stdev(values):.2f}" if len(values) > 1 else ""
    return Value(f"{100 * mean:.2f}{spread} %", mean)


def _count(value: int) -> Value:
    return Value(write(value, Kind.COUNT), value)


def _seed(run: Run) -> Value:
    seed = run.config["seed"]
    return Value(str(seed), seed)


def _start(row: dict[str, Any]) -> str:
    return "from scratch" if row.get("scratch") else "pretrained"


def _folder(row: dict[str, Any]) -> str:
    return PurePath(str(row.get("out", ""))).name
