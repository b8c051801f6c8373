"""Relative error of the finite-difference hypergradient against exact forward-mode differentiation."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.report import Bar, Report, Row
from mlomae.config import HypergradientConfig
from tests.mlo.problem import Problem, build_problem, relative_error

DEFAULT_RADIUS = HypergradientConfig().radius
RADII = sorted({1e-5, 1e-4, 1e-3, 1e-2, DEFAULT_RADIUS})
BOUNDS = {torch.float64: 2e-3, torch.float32: 5e-3}
TRAINED_STEPS = 60


def _error(problem: Problem, dtype: torch.dtype, levels: int, radius: float, exact: Tensor) -> float:
    changed = problem.converted(dtype, levels=levels, hypergradient={"radius": radius})
    return relative_error(changed.hypergradient(), exact)


def test_hypergradient_error(report: Report) -> None:
    rows: list[Row] = []
    bars: list[Bar] = []
    for steps in (0, TRAINED_STEPS):
        problem = build_problem(steps)
        for levels in (2, 3):
            exact = problem.converted(torch.float64, levels=levels).exact
            for dtype, bound in BOUNDS.items():
                errors = {radius: _error(problem, dtype, levels, radius, exact) for radius in RADII}
                by_radius = {f"r = {radius:.0e}": error for radius, error in errors.items()}
                name = str(dtype).removeprefix("torch.")
                rows.append({"steps": steps, "levels": levels, "dtype": name, **by_radius})
                what = f"{steps} steps, levels {levels}, {name}, r = {DEFAULT_RADIUS:.0e} (default)"
                bars.append(Bar(what, errors[DEFAULT_RADIUS], "<=", bound))
    report.table("relative error by radius r, in units of the weights' norm", rows)
    report.check(*bars)
