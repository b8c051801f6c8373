"""Fine-tunings of a few plain steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mlomae.distributed.env import World
from mlomae.downstream.finetune import Classification, Config, run
from mlomae.interop.reading import read_pretrained
from mlomae.preemption import Preemption
from mlomae.run_dir import RunDir

ONE = World(0, 1, torch.device("cpu"))
PLAIN = {
    "crop": "none",
    "flip": False,
    "rand_augment": "none",
    "erasing": 0,
    "mixup": 0,
    "cutmix": 0,
    "label_smoothing": 0,
}
OPTIM = {"epochs": 2, "batch_size": 16, "lr": 3e-3, "layer_decay": 0.9, "drop_path": 0}


def config_of(encoder: Path, **sections: Any) -> Config:
    """Two plain epochs in batches of sixteen, but for what ``sections`` change."""
    tree: dict[str, Any] = {"encoder": str(encoder), "device": "cpu", "log_every": 1, **sections}
    tree["optim"] = {**OPTIM, **tree.get("optim", {})}
    tree["augment"] = {**PLAIN, **tree.get("augment", {})}
    return Config.model_validate(tree)


def finetune(folder: Path, config: Config, world: World = ONE) -> dict[str, Any]:
    run_dir = RunDir(folder, config)
    if world.primary:
        run_dir.claim(primary=True)
    try:
        with Preemption() as preemption:
            return run(config, read_pretrained(Path(config.encoder)), run_dir, world, preemption)
    finally:
        run_dir.release()


def task_of(encoder: Path, folder: Path, world: World = ONE, **sections: Any) -> Classification:
    config = config_of(encoder, **sections)
    return Classification(config, read_pretrained(encoder), RunDir(folder, config), world)
