"""The peak of real outer iterations on the CPU, beside what the plan predicts for them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mlomae.distributed.env import join_world
from mlomae.memory import peak_bytes
from mlomae.planning.memory import Memory
from mlomae.planning.sharding import Sharding
from mlomae.run_dir import RunDir
from mlomae.trainer import Trainer
from tests.data.made_scenes import write_scenes
from tests.integration.tiny import Fields, tiny_config

CLASSES, IMAGES = 4, 80
# Activations and weights of the same order, so that neither hides an error in the other.
SMALL = {
    "model.arch": "vit_micro",
    "model.img_size": 32,
    "model.patch_size": 4,
    "model.in_chans": 3,
    "model.decoder_dim": 64,
    "model.decoder_depth": 2,
    "model.decoder_heads": 4,
    "model.pool": "cls",
    "masking.ratio": 0.75,
    "masking.hidden": 64,
    "pretrain.batch_size": 16,
    "head.batch_size": 16,
    "mask.batch_size": 16,
    "hypergradient.check_every": 0,
    "iterations": 100,
    "data.dataset": "folder",
    "data.heldout_fraction": 0.3,
}
# So many classes that the head's logits are what counts.
PIXELS = {"data.dataset": "scenes", "data.num_classes": 60, "data.heldout_fraction": 0.5}
CASES: dict[str, Fields] = {
    "learned": {},
    "random": {"masking.policy": "random"},
    "hard": {"masking.policy": "hard"},
    "hard, many patches": {
        "masking.policy": "hard",
        "model.patch_size": 2,
        "model.arch": "vit_pico",
        "model.decoder_dim": 16,
    },
    "labels": {"pretrain.label_weight": 0.5, "masking.policy": "random"},
    "bf16": {"compute.precision": "bf16"},
    "bf16, random": {"compute.precision": "bf16", "masking.policy": "random"},
    "micro-batches": {"pretrain.micro_batches": 4, "head.batch_size": 4, "mask.batch_size": 4},
    "checkpointing": {"compute.activation_checkpointing": True},
    "checkpointing, bf16": {"compute.activation_checkpointing": True, "compute.precision": "bf16"},
    "checkpointing, random": {"compute.activation_checkpointing": True, "masking.policy": "random"},
    "two levels": {"levels": 2},
    "one step, random": {"pretrain.unroll_steps": 1, "masking.policy": "random"},
    "predict all": {"model.predict": "all", "masking.policy": "random"},
    "pool mean": {"model.pool": "mean"},
    "pico": {"model.arch": "vit_pico"},
    "tiny": {"model.arch": "vit_tiny", "pretrain.batch_size": 8, "mask.batch_size": 8},
    "jvp": {"hypergradient.estimator": "jvp", "head.batch_size": 4, "mask.batch_size": 4},
    "pixels": PIXELS,
    "pixels, two levels": {**PIXELS, "levels": 2, "head.batch_size": 32, "mask.batch_size": 8},
    "pixels, implicit": {**PIXELS, "hypergradient.best_response": "implicit"},
    "adam": {"hypergradient.precondition": "adam", "head.batch_size": 4, "mask.batch_size": 4},
}


def measure(folder: Path, fields: Fields) -> tuple[int, Memory]:
    """Bytes that two outer iterations take at their worst moment beyond what lives between them; the plan."""
    data = folder / "data"
    config = tiny_config({**SMALL, "run_dir": folder / "run", "data.path": str(data), **fields})
    if config.data.has_label_maps:
        write_scenes(data, "training", IMAGES, config.model.size)
        write_scenes(data, "validation", 1, config.model.size, first=IMAGES)
    else:
        _write_images(data)
    trainer = Trainer(config, RunDir(config.run_dir, config), join_world("cpu"), None)
    # The first iteration makes the moments.
    trainer.iterate(0)

    def train() -> None:
        masked = None
        for iteration in (1, 2):
            # As a run does, which logs the batch of the iteration before.
            masked = trainer.iterate(iteration)
        assert masked is not None

    found = peak_bytes(train, torch.device("cpu"))
    trainer.loaders.close()
    return found, Memory(config, Sharding(1), trainer.precision, config.data.num_classes or CLASSES)


def _write_images(folder: Path) -> None:
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        path = folder / f"class{number % CLASSES}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(path)
