"""One cluster for all tests of a run, and a training program that ends as it is told."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, why_not

# Stands for the Python of a job: `-m mlomae train` runs the test's own script instead, all else is real.
_PYTHON = """\
#!/bin/bash
case "$*" in
    "-m mlomae train"*) exec bash {train} "${{@:4}}" ;;
    *) exec {python} "$@" ;;
esac
"""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    started = Cluster(tmp_path_factory.mktemp("cluster"))
    yield started
    started.close()


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A Python whose ``-m mlomae train …`` runs ``train.sh`` beside it, with the same arguments."""
    path = tmp_path / "python"
    path.write_text(_PYTHON.format(train=tmp_path / "train.sh", python=sys.executable))
    path.chmod(0o755)
    return path
