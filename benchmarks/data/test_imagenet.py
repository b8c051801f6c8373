"""Photographs for pretraining at 224 pixels, from files and from shards, against torchvision's folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.comparison import Compare
from benchmarks.data.streams import PLAIN_READING, compare_streams, show_speeds
from benchmarks.data.torchvision_loop import READ_AHEAD, TorchvisionStream, default_crop, mae_recipe
from benchmarks.environment import ROOT
from benchmarks.report import Report
from mlomae.config import load_config
from mlomae.data.loader import LevelLoaders

# Seven batches are an epoch of NUM_PHOTOGRAPHS: every round reads the same images.
BATCH, BATCHES = 32, 7
ROUNDS, WARM_UP = 5, 1
AT_LEAST = {0: 1.5, 2: 1.0}
"""By loader processes: on two cores, two of them share these with the one that trains."""
SOURCES = {
    "folder": {"data.dataset": "folder"},
    "shards": {"data.dataset": "shards", "data.access": "random"},
    "sequential-shards": {"data.dataset": "shards", "data.access": "sequential"},
}


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("source", SOURCES)
def test_imagenet(
    source: str,
    workers: int,
    photographs: Path,
    photograph_shards: Path,
    one_thread: None,
    compare: Compare,
    report: Report,
) -> None:
    overrides = {
        **SOURCES[source],
        "data.path": str(photographs if source == "folder" else photograph_shards),
        "data.workers": str(workers),
        "pretrain.batch_size": str(BATCH),
        **PLAIN_READING,
    }
    config = load_config(ROOT / "recipes" / "imagenet_vit_b16.yaml", overrides)
    loaders = LevelLoaders(config)
    side = config.model.size[0]
    transforms = {
        "torchvision as in MAE": mae_recipe(side, loaders.mean, loaders.std),
        "torchvision by default": default_crop(side),
    }
    # Longer with workers: all but one of them may have a batch ready when a round begins, but not where they
    # share each batch.
    batches = BATCHES * (1 + workers)
    # Its workers go on reading ahead at the end of a round, as ours do.
    enough = batches + READ_AHEAD * workers
    baselines = {
        name: TorchvisionStream(photographs, transform, BATCH, enough, workers)
        for name, transform in transforms.items()
    }
    name = f"data/imagenet/{source}/{workers}-workers"
    compared = compare_streams(
        compare, name, loaders.pretrain, baselines, batches, AT_LEAST[workers], ROUNDS, WARM_UP
    )
    show_speeds(report, f"{source}, batches of {BATCH}", BATCH * batches, workers, compared)
