"""What the studies share."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def cifar10(request: pytest.FixtureRequest) -> Path:
    """The folder of CIFAR-10 shards that ``--cifar10`` names; the test is skipped without it."""
    given: Path | None = request.config.getoption("cifar10")
    if given is None:
        pytest.skip("--cifar10 DIR names no folder of CIFAR-10 shards (train-*.tar, test-*.tar)")
    return given.resolve()
