"""One place of execution for the tests of a process, so that runs and data sets are made once."""

from __future__ import annotations

import pytest

from tests.docs.execution import Execution


@pytest.fixture(scope="session")
def execute(tmp_path_factory: pytest.TempPathFactory) -> Execution:
    return Execution(tmp_path_factory.mktemp("documents"))
