"""Training is the costly part: the two networks are trained once and shared, the rest works on copies."""

from __future__ import annotations

import pytest

from tests.mlo.problem import Problem, build_problem

TRAINING_STEPS = 50
NETWORKS = ("token", "mlp")


@pytest.fixture(scope="session", params=NETWORKS)
def trained(request: pytest.FixtureRequest) -> Problem:
    """float32, levels 3, after ``TRAINING_STEPS`` outer iterations. Not to be changed: use ``converted``."""
    return build_problem(TRAINING_STEPS, masking={"network": request.param})


@pytest.fixture(scope="session", params=NETWORKS)
def initial(request: pytest.FixtureRequest) -> Problem:
    """The same before the first step."""
    return build_problem(0, masking={"network": request.param})


@pytest.fixture
def fresh() -> Problem:
    """An untrained float32 problem that a test may change."""
    return build_problem(0)
