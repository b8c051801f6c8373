"""Does reading leak? Memory of a process and its loader processes after each of 20 epochs over shards."""

from __future__ import annotations

import gc
import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path
from statistics import linear_regression

import pytest

from benchmarks.data.images import link_shards, pack, write_small_images
from benchmarks.environment import ROOT
from benchmarks.process_memory import MIB, memory_of, skip_without_accounts
from benchmarks.report import Bar, Report
from mlomae.config import load_config
from mlomae.data.loader import LevelLoaders

pytestmark = pytest.mark.study

EPOCHS, WARM_UP = 20, 3
NUM_SHARDS = 4
CASES = {
    f"{access}, {workers} workers": {"data.access": access, "data.workers": str(workers)}
    for access in ("sequential", "random")
    for workers in (0, 2)
}
MAX_GROWTH = 1.0  # MiB per epoch


@pytest.fixture
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A few shards of CIFAR-10, or of synthetic images of its size."""
    folder = tmp_path / "shards"
    given = request.config.getoption("cifar10")
    if given is None:
        write_small_images(tmp_path / "images")
        pack(tmp_path / "images", folder, NUM_SHARDS)
    else:
        link_shards(given, folder, NUM_SHARDS)
    return folder


def _memory() -> float:
    """MiB of this process and its children; what they share counts once."""
    gc.collect()
    return memory_of([os.getpid(), *(child.pid for child in multiprocessing.active_children() if child.pid)])


def _read(loaders: LevelLoaders, batch: int, epochs: int) -> Iterator[float]:
    """Memory after each epoch."""
    for _ in range(epochs):
        for _ in range(loaders.sizes["train"] // batch):
            loaders.pretrain.next()
        yield _memory()
    loaders.close()


def test_data_memory(request: pytest.FixtureRequest, report: Report, smoke: list[str], shards: Path) -> None:
    skip_without_accounts()
    epochs = WARM_UP + max(2, request.config.getoption("iterations")) if smoke else EPOCHS
    memory: dict[str, list[float]] = {}
    images = 0
    for name, access in CASES.items():
        overrides = {
            "data.path": str(shards),
            "data.resident": "never",
            "data.heldout_fraction": "0.01",
            "data.test_fraction": "0.01",
            "masking.policy": "random",
            "device": "cpu",
            **access,
        }
        config = load_config(ROOT / "recipes" / "cifar10_micro.yaml", overrides)
        loaders = LevelLoaders(config)
        images = loaders.sizes["train"]
        memory[name] = list(_read(loaders, config.pretrain.batch_size, epochs))
    slopes = {
        name: linear_regression(range(WARM_UP, epochs), values[WARM_UP:]).slope
        for name, values in memory.items()
    }
    report.table(
        f"MiB after each epoch over {images:,} images in {NUM_SHARDS} shards",
        [
            {"epoch": epoch + 1, **{name: values[epoch] for name, values in memory.items()}}
            for epoch in range(epochs)
        ],
    )
    report.table(
        f"growth from epoch {WARM_UP + 1} on, by least squares",
        [
            {
                "reading": name,
                "highest, MiB": max(memory[name]),
                "MiB per epoch": slope,
                "bytes per image": slope * MIB / images,
            }
            for name, slope in slopes.items()
        ],
    )
    if not smoke:
        report.check(
            *(Bar(f"{name}: MiB per epoch", slope, "<", MAX_GROWTH) for name, slope in slopes.items())
        )
