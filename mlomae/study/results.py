"""What the runs of a study left, gathered into one small file that needs none of them any more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from pydantic import ValidationError

from mlomae import __version__
from mlomae.config_errors import describe
from mlomae.errors import UserError
from mlomae.report.lines import read_object
from mlomae.report.reading import Run, read_runs
from mlomae.run_dir import to_json
from mlomae.study.plan import Budget, PlannedRun, Study

FORMAT = 1
# Of each curve: enough for a plot of a few hundred pixels.
_POINTS = 40
CURVES = (
    "mask/agreement", "mask/agreement_noiseless", "mask/entropy", "mask/saturation", "loss/reconstruction",
)  # fmt: skip
# Of the environment of a run: what may move a figure.
_MACHINE = ("mlomae", "python", "torch", "device", "precision", "world_size")
# The figure of each evaluation that arms are compared by. One of the same name as at the end of a run
# takes its place: it was asked for.
_SCORES = {"knn": "accuracy", "linear": "accuracy", "finetune": "accuracy", "segment": "miou", "detect": "ap"}
_AT_THE_END = ("knn_accuracy", "linear_accuracy", "head_miou")


@dataclass(frozen=True)
class Row:
    """One finished run.

    Attributes:
        digest: of ``PlannedRun``.
        budgets: under which it counts.
        steps: pretrain steps.
        flops: model FLOPs of its pretraining.
        seconds: of its training, evaluation left out.
        figures: name → value; those in [0, 1] are shares.
        curves: name → [steps, values], outer iterations.
    """

    digest: str
    arm: str
    seed: int
    budgets: tuple[Budget, ...]
    iterations: int
    steps: int
    flops: float
    seconds: float
    figures: dict[str, float]
    curves: dict[str, tuple[list[int], list[float]]]


@dataclass(frozen=True)
class Results:
    """A study and what has come of it so far.

    Attributes:
        planned: runs that it asks for.
        machine: environment of the first run.
    """

    study: Study
    planned: int
    rows: tuple[Row, ...]
    machine: dict[str, Any]

    @property
    def budgets(self) -> list[Budget]:
        """Those that any run counts under."""
        return [budget for budget in get_args(Budget) if any(budget in row.budgets for row in self.rows)]

    def dump(self) -> str:
        """JSON, a run per line; ``load_results`` reads it."""
        head = {
            "format": FORMAT, "mlomae": __version__, "planned": self.planned, "machine": self.machine,
            "study": self.study.model_dump(mode="json", exclude_defaults=True),
        }  # fmt: skip
        runs = ",\n".join(to_json(asdict(row)) for row in self.rows)
        return f'{to_json(head)[:-1]}, "runs": [\n{runs}\n]}}\n'


def load_results(path: Path) -> Results:
    """Reads a results file.

    Raises:
        UserError: it cannot be read, or is no results file.
    """
    tree = read_object(path)
    if tree is None or tree.get("format") != FORMAT:
        raise UserError(f"results {path}: no results of a study; give a study.yaml or its results.json")
    try:
        rows = tuple(Row(**{**row, "budgets": tuple(row["budgets"])}) for row in tree["runs"])
        return Results(Study.model_validate(tree["study"]), tree["planned"], rows, tree["machine"])
    except ValidationError as error:
        raise UserError(f"results {path}: study.{describe(error, Study)}") from None
    except (KeyError, TypeError) as error:
        raise UserError(f"results {path}: damaged ({error})") from None


def gather(study: Study, planned: Sequence[PlannedRun], before: Results | None) -> Results:
    """The results of all runs that are finished, evaluations included.

    Args:
        before: earlier results of this study, which count for runs whose folders are gone.

    Raises:
        UserError: something in a run's folder is damaged.
    """
    rows: list[Row] = []
    machine = {} if before is None else before.machine
    known = done(before)
    for run in planned:
        digest, figures = run.digest(study), _figures(study, run)
        if figures is None:
            if digest in known:
                rows.append(replace(known[digest], arm=run.arm, budgets=run.budgets, flops=run.flops))
            continue
        (told,) = read_runs([run.path])
        assert told.result is not None and told.environment is not None
        machine = machine or {name: told.environment.get(name) for name in _MACHINE}
        about = run.arm, run.seed, run.budgets, run.config.iterations, run.pretrain_steps, run.flops
        rows.append(Row(digest, *about, told.result["seconds"], figures, curves(told)))
    return Results(study, len(planned), tuple(rows), machine)


def done(results: Results | None) -> dict[str, Row]:
    """Rows by their digests."""
    return {} if results is None else {row.digest: row for row in results.rows}


def _figures(study: Study, run: PlannedRun) -> dict[str, float] | None:
    """Scores at the end of the run and of every evaluation; None as long as one is missing."""
    result = read_object(run.path / "result.json") if run.trained else None
    if result is None:
        return None
    figures = {name: result[name] for name in _AT_THE_END if result.get(name) is not None}
    for task, evaluation in study.evaluations_of(run.arm).items():
        found = read_object(evaluation.folder(task, run.path) / "result.json")
        if found is None:
            return None
        figures[f"{task}_{_SCORES[task]}"] = found[_SCORES[task]]
    return figures


def curves(run: Run) -> dict[str, tuple[list[int], list[float]]]:
    """At evenly spaced lines of the log: at the same steps in all runs of an arm, whose mean is drawn."""
    found = {}
    for name in (name for name in CURVES if name in run.scalars):
        steps, values = run.scalars[name].steps, run.scalars[name].values
        chosen = np.linspace(0, len(steps) - 1, min(len(steps), _POINTS)).round().astype(int)
        found[name] = steps[chosen].tolist(), [float(f"{value:.4g}") for value in values[chosen]]
    return found
