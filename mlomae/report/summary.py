"""The cards at the top of the page: a run in a few words and figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mlomae.report.figures import Kind, is_number, name_of, write
from mlomae.report.reading import Run

# The figure that tells of an evaluation, by its task.
_HEADLINES = {
    "knn": ("k-NN evaluation", "accuracy"),
    "linear": ("Linear evaluation", "accuracy"),
    "finetune": ("Fine-tuned", "accuracy"),
    "segment": ("Segmentation mIoU", "miou"),
    "detect": ("Detection AP", "ap"),
}
# Shown where nothing was scored.
_LAST = (
    ("loss/mask", "Mask loss", Kind.NUMBER),
    ("accuracy/head", "Head accuracy", Kind.SHARE),
    ("loss/reconstruction", "Reconstruction error", Kind.NUMBER),
)


@dataclass(frozen=True)
class Figure:
    """A number with its name, and a remark such as a baseline."""

    name: str
    text: str
    remark: str = ""


@dataclass(frozen=True)
class Card:
    """A run.

    Attributes:
        share: of its iterations that are done.
        figures: what it scored; its latest losses where it scored nothing yet.
        facts: one line each.
    """

    name: str
    path: str
    tags: list[str]
    status: str
    share: float
    figures: list[Figure]
    facts: list[Figure]


def card(run: Run) -> Card:
    """The card of a run."""
    height, width = (side * run.config["model.patch_size"] for side in run.grid)
    patch = run.config["model.patch_size"]
    iterations = run.config["iterations"]
    done = run.step if run.result is None else iterations
    if run.result is not None:
        status = f"complete, {write(iterations, Kind.COUNT)} iterations"
    else:
        status = f"iteration {write(done, Kind.COUNT)} of {write(iterations, Kind.COUNT)}"
    return Card(
        name=run.name,
        path="" if str(run.path) == run.name else str(run.path),
        tags=[
            f"{run.policy} mask",
            f"{run.config['model.arch']}/{patch}",
            f"{run.config['data.dataset']} {height} × {width}",  # noqa: RUF001
            f"seed {run.config['seed']}",
        ],
        status=status,
        share=min(1.0, done / iterations),
        figures=list(_scores(run)) or list(_last(run)),
        facts=list(_facts(run)),
    )


def _scores(run: Run) -> Iterator[Figure]:
    for field, value in (run.result or {}).items():
        name = name_of(field)
        if name.kind is Kind.SHARE and is_number(value) and not field.startswith("pixel_"):
            yield Figure(name.text, write(value, Kind.SHARE))
    for task, (title, field) in _HEADLINES.items():
        scores = [row for row in run.evaluations if row.get("task") == task and is_number(row.get(field))]
        own, scratch = ([row for row in scores if bool(row.get("scratch")) is kind] for kind in (False, True))
        if own:
            remarks = [f"from scratch {_score(scratch, field)}"] if scratch else []
            remarks += [f"the latest of {len(own)}"] if len(own) > 1 else []
            yield Figure(title, _score(own, field), "; ".join(remarks))


def _score(rows: list[dict[str, Any]], field: str) -> str:
    """Of the latest evaluation: the best one by test score would be too good."""
    return write(rows[-1][field], Kind.SHARE)


def _last(run: Run) -> Iterator[Figure]:
    for scalar, name, kind in _LAST:
        if scalar in run.scalars and len(values := run.scalars[scalar].finite()):
            yield Figure(name, write(float(values[-1]), kind), "latest")


def _facts(run: Run) -> Iterator[Figure]:
    result = run.result or {}
    if is_number(result.get("seconds")):
        yield Figure("Training time", write(result["seconds"], Kind.SECONDS))
    speed = result.get("images_per_second")
    if speed is None and "images_per_second" in run.scalars:
        values = run.scalars["images_per_second"].finite()
        speed = float(values[-1]) if len(values) else None
    if is_number(speed):
        yield Figure("Images/s", write(speed))
    yield Figure("Removed", write(run.removed_share, Kind.SHARE))
