"""CIFAR-10 shards read front to back, against torchvision's image folder of the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
from torchvision.transforms import ToTensor

from benchmarks.comparison import Compare
from benchmarks.data.streams import PLAIN_READING, compare_streams, show_speeds
from benchmarks.data.torchvision_loop import READ_AHEAD, TorchvisionStream
from benchmarks.environment import ROOT
from benchmarks.report import Report
from mlomae.config import load_config
from mlomae.data.loader import LevelLoaders

BATCH = 128
# Twice what fills the shuffle buffer: how often it is filled in a round does not depend on where one begins.
BATCHES = 64
ROUNDS, WARM_UP = 5, 1
AT_LEAST = {0: 3.0, 2: 2.0}
"""By loader processes: on two cores, two of them share these with the one that trains."""
BASELINE = "torchvision"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", ["none", "crop-flip"])
def test_streaming(
    augment: str,
    workers: int,
    few_shards: Path,
    unpacked_shards: Path,
    one_thread: None,
    compare: Compare,
    report: Report,
) -> None:
    overrides = {
        "data.path": str(few_shards),
        "data.access": "sequential",
        "data.resident": "never",
        "data.augment": augment,
        "data.workers": str(workers),
        "pretrain.batch_size": str(BATCH),
        **PLAIN_READING,
    }
    config = load_config(ROOT / "recipes" / "cifar10_micro.yaml", overrides)
    ours = LevelLoaders(config).pretrain
    # Its workers go on reading ahead at the end of a round, as ours do.
    enough = BATCHES + READ_AHEAD * workers
    theirs = TorchvisionStream(unpacked_shards, ToTensor(), BATCH, enough, workers)
    name = f"data/streaming/{augment}/{workers}-workers"
    compared = compare_streams(
        compare, name, ours, {BASELINE: theirs}, BATCHES, AT_LEAST[workers], ROUNDS, WARM_UP
    )
    show_speeds(report, f"augment {augment}, batches of {BATCH}", BATCH * BATCHES, workers, compared)
