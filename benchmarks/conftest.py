"""Options of the benchmarks, and the report that each of them fills."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from benchmarks.environment import RESULTS, environment
from benchmarks.report import Report
from mlomae.config import Policy

# Lists that a record's command has to repeat where they differ from these.
_DEFAULTS: dict[str, list[str]] = {"policies": ["learned", "random"], "seeds": ["0", "1", "2"]}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    group.addoption("--record", action="store_true", help="write figures to benchmarks/results")
    group.addoption(
        "--iterations", type=int, metavar="N", help="smoke run: N outer iterations, no accuracy is checked"
    )
    group.addoption(
        "--policies", type=_policies, default=_DEFAULTS["policies"], help="mask policies to compare: a,b,…"
    )
    group.addoption("--seeds", type=_seeds, default=_DEFAULTS["seeds"], help="seeds per policy: 0,1,…")
    group.addoption(
        "--cifar10", type=Path, metavar="DIR", help="folder of CIFAR-10 shards, for test_mask_health"
    )
    group.addoption(
        "--work-dir", type=Path, metavar="DIR", help="keep the runs of test_policies here, to continue there"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("record") and config.getoption("iterations") is not None:
        raise pytest.UsageError("--record: not with --iterations; the figures of a smoke run are no results")


@pytest.fixture(scope="session")
def surroundings() -> dict[str, Any]:
    """Read before anything is measured: the commit may move during a long benchmark."""
    return environment()


@pytest.fixture
def report(
    request: pytest.FixtureRequest, surroundings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> Iterator[Report]:
    """Tables and bars of this benchmark; recorded with --record, missed bars included."""
    name = request.node.name.removeprefix("test_").replace("[", "-").rstrip("]")
    report = Report(name, _command(request), surroundings, capsys.disabled)
    yield report
    if request.config.getoption("record"):
        report.write(RESULTS)


@pytest.fixture
def smoke(request: pytest.FixtureRequest, report: Report) -> list[str]:
    """Overrides that shorten a training run; empty for a real one."""
    iterations = request.config.getoption("iterations")
    if iterations is None:
        return []
    report.say(f"SMOKE RUN of {iterations} iterations: accuracies mean nothing and are not checked")
    return ["--iterations", str(iterations)]


@pytest.fixture
def work_dir(request: pytest.FixtureRequest, surroundings: dict[str, Any], tmp_path: Path) -> Path:
    """Where runs are kept: a folder per commit, so that no figure comes from other code."""
    chosen = request.config.getoption("work_dir")
    if chosen is None:
        return tmp_path
    git = surroundings["git"]
    return Path(chosen).resolve() / f"{str(git['sha'])[:12]}{'-dirty' if git['dirty'] else ''}"


def _command(request: pytest.FixtureRequest) -> str:
    words = ["pytest", request.node.nodeid, "--record"]
    for name, default in _DEFAULTS.items():
        value = request.config.getoption(name)
        if value != default:
            words.append(f"--{name} {','.join(value)}")
    return " ".join(words)


def _policies(text: str) -> list[str]:
    names = text.split(",")
    unknown = [name for name in names if name not in get_args(Policy)]
    if unknown:
        raise argparse.ArgumentTypeError(f"no policy {unknown[0]!r}; known: {', '.join(get_args(Policy))}")
    return names


def _seeds(text: str) -> list[str]:
    seeds = text.split(",")
    if not all(seed.isdigit() for seed in seeds):
        raise argparse.ArgumentTypeError(f"found {text!r}, expected whole numbers: 0,1,2")
    return seeds
