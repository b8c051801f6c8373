"""Every estimator of the hypergradient against the exact one: error, time and memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from benchmarks.plots import Curve, plot_radii
from benchmarks.report import Bar, Report, Row
from mlomae.memory import peak_bytes
from mlomae.mlo.estimators import ESTIMATORS, TRUNCATION_ORDER
from tests.mlo.problem import ITERATION, Problem, TensorStream, build_problem, relative_error

pytestmark = pytest.mark.study

TRAINED_STEPS = 400
STATES = (0, TRAINED_STEPS)
# Name → dtype of weights and images, and whether the passes run under bf16 autocast.
PRECISIONS: dict[str, tuple[torch.dtype, bool]] = {
    "float32": (torch.float32, False),
    "bf16 autocast": (torch.float32, True),
}
MIN_COSINE = {"float32": 0.999, "bf16 autocast": 0.99}
RADII = [10.0 ** (-exponent / 2) for exponent in range(12, 2, -1)]
ROUNDS = 7
CPU = torch.device("cpu")
Point = tuple[float, float]
"""A radius and the relative error there."""


def _cosine(found: Tensor, exact: Tensor) -> float:
    return float(cosine_similarity(found.double(), exact, dim=0))


def _seconds(run: Callable[[], object]) -> float:
    times = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _influence_of(problem: Problem) -> Callable[[], object]:
    hypergradient = problem.mask.hypergradient
    direction = hypergradient.direction(problem.train, problem.heldout, ITERATION)
    # The next one is no longer the first, which would look for its radius.
    hypergradient.influence(problem.masked, direction)
    return lambda: hypergradient.influence(problem.masked, direction)


def _pretrain_step_of(problem: Problem) -> Callable[[], object]:
    batch = TensorStream(1).next()
    problem.pretrain.step(batch, ITERATION)  # allocates the optimizer's state
    return lambda: problem.pretrain.step(batch, ITERATION)


@pytest.fixture(scope="module")
def problems() -> dict[int, Problem]:
    return {steps: build_problem(steps) for steps in STATES}


def test_hypergradient_error(report: Report, problems: dict[int, Problem]) -> None:
    rows: list[Row] = []
    bars: list[Bar] = []
    for steps, problem in problems.items():
        exact = problem.converted(torch.float64).exact
        for precision, (dtype, mixed) in PRECISIONS.items():
            step = _pretrain_step_of(problem.converted(dtype, mixed))
            step_seconds, step_peak = _seconds(step), peak_bytes(step, CPU)
            for name in ("default", *ESTIMATORS):
                settings: dict[str, Any] = {} if name == "default" else {"estimator": name}
                changed = problem.converted(dtype, mixed, hypergradient=settings)
                found, influence = changed.hypergradient(), _influence_of(changed)
                peak = peak_bytes(influence, CPU)
                radius = changed.mask.hypergradient.radius
                differs = changed.mask.hypergradient.estimator in TRUNCATION_ORDER
                rows.append(
                    {
                        "steps": steps,
                        "precision": precision,
                        "estimator": name,
                        "cosine": _cosine(found, exact),
                        "relative error": relative_error(found, exact),
                        "own estimate": radius.error if differs else None,
                        "radius": radius.value if differs else None,
                        "time / pretrain step": _seconds(influence) / step_seconds,
                        "peak / pretrain step": peak / step_peak,
                    }
                )
                if name == "default":
                    where = f"{steps} steps, {precision}, default"
                    bars.append(Bar(f"{where}: cosine", _cosine(found, exact), ">=", MIN_COSINE[precision]))
                    bars.append(
                        Bar(f"{where}: peak of influence / pretrain step", peak / step_peak, "<=", 1.0)
                    )
    report.table("estimators", rows)
    report.check(*bars)


def _error_at(problem: Problem, exact: Tensor, precision: tuple[torch.dtype, bool], **settings: Any) -> Point:
    """The radius that was used, and the relative error there."""
    changed = problem.converted(*precision, hypergradient={"precision": "engine", **settings})
    found = relative_error(changed.hypergradient(), exact)
    return changed.mask.hypergradient.radius.value, found


def test_hypergradient_radius(
    report: Report, problems: dict[int, Problem], request: pytest.FixtureRequest
) -> None:
    rows: list[Row] = []
    curves: list[Curve] = []
    for steps, problem in problems.items():
        exact = problem.converted(torch.float64).exact
        for precision, kind in {"float64": (torch.float64, False), **PRECISIONS}.items():
            for name in TRUNCATION_ORDER:
                points = [_error_at(problem, exact, kind, estimator=name, radius=r) for r in RADII]
                chosen = _error_at(problem, exact, kind, estimator=name)
                curves.append(Curve(name, f"{precision}, {steps} steps", points, chosen))
                rows.append(
                    {
                        "steps": steps,
                        "precision": precision,
                        "estimator": name,
                        **{f"{radius:.0e}": value for radius, value in points[::2]},
                        "automatic": chosen[1],
                        "at": chosen[0],
                    }
                )
    report.table("relative error by radius, in units of the encoder's norm", rows)
    if request.config.getoption("record"):
        plot_radii(curves)


def test_hypergradient_terms(report: Report, problems: dict[int, Problem]) -> None:
    """What leaving out or changing a part of the method changes: exact gradients against each other."""
    rows: list[Row] = []
    for steps, problem in problems.items():
        for head_lr in (1e-3, 1e-2, 1e-1, 1.0):

            def gradient(levels: int = 3, response: str = "one-step", of: Any = (problem, head_lr)) -> Tensor:
                settings = {"estimator": "jvp", "best_response": response}
                changed = of[0].converted(
                    torch.float64, levels=levels, head={"lr": of[1]}, hypergradient=settings
                )
                return changed.hypergradient()

            full = gradient()
            rows.append(
                {
                    "steps": steps,
                    "head lr": head_lr,
                    "levels 2": _cosine(gradient(levels=2), full),
                    "implicit": _cosine(gradient(response="implicit"), full),
                }
            )
    report.table("cosine to the gradient with one look-ahead step of the head", rows)
