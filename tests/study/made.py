"""Studies of the tiny run, and results as if their runs had been finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from mlomae.study.plan import Study
from mlomae.study.results import Results, Row
from tests.integration.tiny import FEW_TO_FIT, write_recipe

ARMS: dict[str, Any] = {
    "random": {"set": {"masking.policy": "random"}, "budgets": ["steps", "flops"]},
    "learned": {"against": "random", "budgets": ["steps", "flops"]},
}


def write_study(folder: Path, **fields: Any) -> Path:
    """A study of the tiny recipe; beside it the recipe."""
    recipe = write_recipe(folder / "tiny.yaml", {"picture_every": 2, "loggers": [], **FEW_TO_FIT})
    study = {"recipe": str(recipe), "steps": 8, "seeds": [0], "arms": ARMS, **fields}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def results(scores: dict[str, list[float]], **study: Any) -> Results:
    """Runs of each arm with these accuracies, seeds counted from 0, under both budgets."""
    arms = {name: {"against": None if name == "random" else "random"} for name in scores}
    rows = [
        Row(
            f"{name}-{seed}", name, seed, ("steps", "flops"), 4, 8, 2e12, 10.0 + seed,
            {"knn_accuracy": value}, {"mask/agreement": ([2, 4], [0.6, 0.7])},
        )
        for name, values in scores.items()
        for seed, value in enumerate(values)
    ]  # fmt: skip
    seeds = tuple(range(max(map(len, scores.values()))))
    made = Study.model_validate({"arms": arms, "seeds": seeds, **study})
    return Results(made, len(rows), tuple(rows), {"device": "a processor", "torch": "9.9"})
