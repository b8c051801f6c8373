"""Options of the benchmarks, and the fixtures that time functions, compare them and report on them."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.comparison import Compare
from benchmarks.environment import RESULTS, ROOT, environment
from benchmarks.ratio_plugin import RatioPlugin, add_options
from benchmarks.ratios import Ratios
from benchmarks.report import OpenReport, Report
from mlomae.sections import Policy

BENCHMARKS = ROOT / "benchmarks"
# Lists that a record's command has to repeat where they differ from these.
_DEFAULTS: dict[str, list[str]] = {"policies": ["learned", "random"], "seeds": ["0", "1", "2"]}
_PLUGIN = pytest.StashKey[RatioPlugin]()
_SURROUNDINGS = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    add_options(group)
    group.addoption("--studies", action="store_true", help="run the long ones too")
    group.addoption("--record", action="store_true", help="write figures to benchmarks/results")
    group.addoption(
        "--iterations", type=int, metavar="N", help="smoke run: N rounds or iterations, nothing is judged"
    )
    group.addoption(
        "--policies", type=_policies, default=_DEFAULTS["policies"], help="mask policies to compare: a,b,…"
    )
    group.addoption("--seeds", type=_seeds, default=_DEFAULTS["seeds"], help="seeds per policy: 0,1,…")
    group.addoption("--cifar10", type=Path, metavar="DIR", help="folder of CIFAR-10 shards")
    group.addoption("--camvid", type=Path, metavar="DIR", help="folder of CamVid in ADE20K's layout")
    group.addoption("--bccd", type=Path, metavar="DIR", help="folder of BCCD in COCO's layout")
    group.addoption("--imagenet", type=Path, metavar="DIR", help="folder of photographs, however deep")
    group.addoption(
        "--work-dir", type=Path, metavar="DIR", help="keep the runs of studies here, to continue there"
    )


@pytest.hookimpl(tryfirst=True, optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """No test process beside this one: what is timed has the machine for itself."""
    return 0


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "study: takes long; runs when its path is given, with --studies or with -m study"
    )
    smoke = config.getoption("iterations") is not None
    if config.getoption("record") and smoke:
        raise pytest.UsageError("--record: not with --iterations; the figures of a smoke run are no results")
    # Read before anything is measured: the commit may move during a long benchmark.
    config.stash[_SURROUNDINGS] = environment()
    config.stash[_PLUGIN] = RatioPlugin(config, smoke, config.stash[_SURROUNDINGS])
    config.pluginmanager.register(config.stash[_PLUGIN], "benchmark-ratios")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves the studies out, except those that the command names."""
    if config.getoption("studies") or "study" in config.option.markexpr:
        return
    given = (config.invocation_params.dir / argument.partition("::")[0] for argument in config.args)
    named = [path.resolve() for path in given if BENCHMARKS in path.resolve().parents]

    def left_out(item: pytest.Item) -> bool:
        is_named = any(path == item.path or path in item.path.parents for path in named)
        return item.get_closest_marker("study") is not None and not is_named

    config.hook.pytest_deselected(items=[item for item in items if left_out(item)])
    items[:] = [item for item in items if not left_out(item)]


@pytest.fixture(scope="session")
def surroundings(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Commit, machine and versions."""
    return request.config.stash[_SURROUNDINGS]


@pytest.fixture(scope="session")
def open_report(request: pytest.FixtureRequest, surroundings: dict[str, Any]) -> OpenReport:
    """Opens the report of a benchmark, given its name and what pytest calls it; recorded with --record."""
    capture = request.config.pluginmanager.getplugin("capturemanager")

    @contextmanager
    def opened(name: str, nodeid: str) -> Iterator[Report]:
        report = Report(name, _command(request, nodeid), surroundings, capture.global_and_fixture_disabled)
        yield report
        if request.config.getoption("record"):
            report.write(RESULTS)

    return opened


@pytest.fixture
def report(request: pytest.FixtureRequest, open_report: OpenReport) -> Iterator[Report]:
    """Tables and bars of this test; recorded with --record, missed bars included."""
    name = request.node.name.removeprefix("test_").replace("[", "-").rstrip("]")
    with open_report(name, request.node.nodeid) as report:
        yield report


@pytest.fixture(scope="session")
def ratios(request: pytest.FixtureRequest) -> Ratios:
    """``ratios.check(name, value, baseline)`` holds a ratio to benchmarks/ratios.json."""
    return request.config.stash[_PLUGIN].ratios


@pytest.fixture
def compare(request: pytest.FixtureRequest, ratios: Ratios, benchmark: BenchmarkFixture) -> Compare:
    """Times a function in turns with its baselines and holds the ratios to benchmarks/ratios.json."""
    return Compare(benchmark, ratios, request.config.getoption("iterations"))


@pytest.fixture
def smoke(request: pytest.FixtureRequest, report: Report) -> list[str]:
    """Overrides that shorten a training run; empty for a real one."""
    iterations = request.config.getoption("iterations")
    if iterations is None:
        return []
    report.say(f"SMOKE RUN of {iterations} iterations: figures mean nothing and are not checked")
    return ["--iterations", str(iterations)]


@pytest.fixture
def work_dir(request: pytest.FixtureRequest, surroundings: dict[str, Any], tmp_path: Path) -> Path:
    """Where runs are kept: a folder per commit, so that no figure comes from other code."""
    chosen = request.config.getoption("work_dir")
    if chosen is None:
        return tmp_path
    git = surroundings["git"]
    return Path(chosen).resolve() / f"{str(git['sha'])[:12]}{'-dirty' if git['dirty'] else ''}"


def _command(request: pytest.FixtureRequest, nodeid: str) -> str:
    words = ["pytest", nodeid, "--record"]
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
