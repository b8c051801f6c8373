"""What run directories tell about themselves, without their pictures (``mlomae.report.pictures``)."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from mlomae.config import Config, dump_config, flatten
from mlomae.errors import UserError
from mlomae.report.lines import read_lines, read_object
from mlomae.report.series import Floats, Series
from mlomae.sections import MaskingConfig

LAST_LINES = 10
"""Log lines whose frequency by position is averaged: one alone is a single batch, mostly noise."""


@dataclass(frozen=True)
class Run:
    """One run directory.

    Attributes:
        name: of the folder; with as many of its parents as tell it from the other runs.
        config: dotted field → value; fields that are newer than the run have their defaults.
        defaults: the same of a run without a recipe.
        scalars: name → series of ``metrics.jsonl``.
        step: the last one logged, 0 before the first.
        frequency: [L], share of training images in which each position was removed in the last
            ``LAST_LINES`` log lines; None before the first.
        result: of the finished run.
        evaluations: of finished ``mlomae eval``, oldest first.
        environment: versions and device; None for runs that did not note them.
        attempts: starts by Slurm; 0 for other runs.
    """

    path: Path
    name: str
    config: dict[str, Any]
    defaults: dict[str, Any]
    scalars: dict[str, Series]
    step: int
    frequency: Floats | None
    result: dict[str, Any] | None
    evaluations: list[dict[str, Any]]
    environment: dict[str, Any] | None
    attempts: int

    @property
    def policy(self) -> str:
        return str(self.config["masking.policy"])

    @property
    def masking(self) -> MaskingConfig:
        """What its policy stands for; not checked, and with defaults in all other fields."""
        fields: dict[str, Any] = {"policy": self.policy}
        return MaskingConfig.model_construct(**fields)

    @property
    def learns(self) -> bool:
        """Whether a hypergradient trains the masking network."""
        return self.masking.learns

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        size, patch = self.config["model.img_size"], self.config["model.patch_size"]
        height, width = size if isinstance(size, list) else (size, size)
        return height // patch, width // patch

    @property
    def removed_share(self) -> float:
        """Of the patches of an image."""
        patches = math.prod(self.grid)
        return 1 - int(patches * (1 - self.config["masking.ratio"]) + 1e-9) / patches


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """The runs in the given order.

    Raises:
        UserError: a folder is no run directory, is given twice, or something in it is damaged.
    """
    return [_read_run(path, name) for path, name in zip(paths, run_names(paths), strict=True)]


def run_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path that no other one ends with.

    Raises:
        UserError: a folder is given twice.
    """
    resolved = [path.resolve() for path in paths]
    names = []
    for path in resolved:
        if resolved.count(path) > 1:
            raise UserError(f"run {path}: given twice; give each run once")
        others = [other for other in resolved if other != path]
        # At full length no two are alike.
        count = next(
            n
            for n in range(1, len(path.parts) + 1)
            if all(other.parts[-n:] != path.parts[-n:] for other in others)
        )
        # A name need not be text.
        names.append(os.fsencode(Path(*path.parts[-count:])).decode(errors="replace"))
    return names


def _read_run(path: Path, name: str) -> Run:
    if not path.is_dir():
        raise UserError(f"run {path}: no such folder; give one that `mlomae train` has written")
    defaults = flatten(yaml.safe_load(dump_config(Config())))
    scalars, step, frequency = _read_metrics(path / "metrics.jsonl")
    run = Run(
        path=path,
        name=name,
        config={**defaults, **_read_config(path)},
        defaults=defaults,
        scalars=scalars,
        step=step,
        frequency=frequency,
        result=read_object(path / "result.json"),
        evaluations=[row for _, row in read_lines(path / "evaluations.jsonl")],
        environment=read_object(path / "environment.json"),
        attempts=sum(1 for _ in read_lines(path / "attempts.jsonl")),
    )
    if frequency is not None and len(frequency) != math.prod(run.grid):
        raise UserError(
            f"{path / 'metrics.jsonl'}: mask/frequency has {len(frequency)} numbers, config.yaml "
            f"{math.prod(run.grid)} patches"
        )
    return run


def _read_config(run: Path) -> dict[str, Any]:
    path = run / "config.yaml"
    try:
        tree = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise UserError(
            f"run {run}: not a run directory (no config.yaml); give a folder that `mlomae train` has written"
        ) from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("masking"), dict):
        raise UserError(
            f"{path}: not the configuration of a run (no section masking); give a folder that "
            "`mlomae train` has written, not one of `mlomae eval`"
        )
    return flatten(tree)


def _read_metrics(path: Path) -> tuple[dict[str, Series], int, Floats | None]:
    """Series by name, the last step, and the latest frequency by position."""
    columns: dict[str, dict[int, float]] = {}
    frequencies: deque[list[float]] = deque(maxlen=LAST_LINES)
    last = 0
    for place, row in read_lines(path):
        step = row.pop("step", None)
        if not isinstance(step, int):
            raise UserError(f"{place}: found step {step!r}, expected a whole number")
        frequency = row.pop("mask/frequency", None)
        if isinstance(frequency, list) and frequency:
            frequencies.append(frequency)
        for name, value in row.items():
            if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
                # A step that is there twice counts as it was last.
                columns.setdefault(name, {})[step] = math.nan if value is None else float(value)
        last = max(last, step)
    try:
        mean = np.array(frequencies, np.float64).mean(axis=0) if frequencies else None
    except (ValueError, TypeError):
        raise UserError(f"{path}: mask/frequency is damaged; expected a number for each patch") from None
    return {name: _series(column) for name, column in columns.items()}, last, mean


def _series(column: dict[int, float]) -> Series:
    steps = sorted(column)
    values = np.array([column[step] for step in steps], np.float64)
    return Series(np.array(steps, np.int64), np.where(np.isfinite(values), values, np.nan))
