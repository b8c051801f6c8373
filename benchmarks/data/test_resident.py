"""Our loaders against torchvision's transforms and torch's DataLoader, alone and in training.

The images have CIFAR's size, and training means plain MAE steps: the cheapest ones, which wait the most.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.comparison import OURS, Compare, Compared
from benchmarks.data.models import MODELS
from benchmarks.data.streams import Stream, read
from benchmarks.data.torchvision_loop import TorchvisionStream, crop_flip
from benchmarks.environment import ROOT
from benchmarks.report import Report
from benchmarks.timing import Function
from mlomae.config import Config, load_config
from mlomae.data.loader import LevelLoaders
from mlomae.distributed.env import join_world
from mlomae.run_dir import RunDir
from mlomae.trainer import Trainer

BATCHES = 24
"""In a round. Workers have up to four of them ready when it begins, which is in their favour."""
ROUNDS, WARM_UP = 5, 1
# Baseline → loader processes.
WORKERS = {"torchvision": 0, "torchvision with workers": 2}
LOADER_AT_LEAST = 10.0
# How much faster training has to be: the more of the time the steps themselves take, the less can be gained.
END_TO_END_AT_LEAST = {"tiny": 2.0, "micro": 1.0}


def _configure(folder: Path, changes: dict[str, str] | None = None) -> Config:
    overrides = {"data.dataset": "folder", "data.path": str(folder), "masking.policy": "random"}
    recipe = ROOT / "recipes" / "cifar10_micro.yaml"
    return load_config(recipe, {**overrides, "device": "cpu", **(changes or {})})


def _baselines(config: Config, folder: Path) -> dict[str, TorchvisionStream]:
    loaders = LevelLoaders(config)
    transform = crop_flip(config.model.size[0], loaders.mean, loaders.std)
    return {
        name: TorchvisionStream(folder, transform, config.pretrain.batch_size, BATCHES, workers)
        for name, workers in WORKERS.items()
    }


def _show(report: Report, what: str, config: Config, compared: Compared) -> None:
    images = BATCHES * config.pretrain.batch_size
    report.table(
        f"{what}, batches of {config.pretrain.batch_size}, {torch.get_num_threads()} threads, medians",
        [
            {"loader": name, "images/s": images / seconds, "ours / it": compared.ratios.get(name)}
            for name, seconds in compared.medians.items()
        ],
    )


def test_loader(image_folder: Path, compare: Compare, report: Report) -> None:
    config = _configure(image_folder)
    streams = _baselines(config, image_folder)
    compared = compare(
        "data/loader",
        read(LevelLoaders(config).pretrain, BATCHES),
        {name: read(stream, BATCHES) for name, stream in streams.items()},
        at_least=dict.fromkeys(WORKERS, LOADER_AT_LEAST),
        rounds=ROUNDS,
        warm_up=WARM_UP,
        before={name: stream.restart for name, stream in streams.items()},
    )
    _show(report, "loading alone", config, compared)


def _train(config: Config, folder: Path, stream: Stream | None = None) -> Function:
    """Pretrain steps on a stream's batches; on the trainer's own without one."""
    level = Trainer(config, RunDir(folder, config), join_world("cpu"), None).levels.pretrain
    if stream is not None:
        level.stream = stream

    def train() -> None:
        for _ in range(BATCHES):
            level.step(level.next_batch(), 0)

    return train


@pytest.mark.parametrize("model", MODELS)
def test_end_to_end(model: str, image_folder: Path, compare: Compare, report: Report, tmp_path: Path) -> None:
    config = _configure(image_folder, MODELS[model])
    streams = _baselines(config, image_folder)
    compared = compare(
        f"data/end-to-end/{model}",
        _train(config, tmp_path / OURS),
        {name: _train(config, tmp_path / name, stream) for name, stream in streams.items()},
        at_least=dict.fromkeys(WORKERS, END_TO_END_AT_LEAST[model]),
        rounds=ROUNDS,
        warm_up=WARM_UP,
        before={name: stream.restart for name, stream in streams.items()},
    )
    _show(report, f"plain MAE steps, {model}", config, compared)
