"""The smallest run that exercises everything: digits, a two-block encoder, batches of eight images."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from mlomae.cli import main
from mlomae.config import Config
from mlomae.distributed.env import World, join_world
from mlomae.run_dir import RunDir
from mlomae.telemetry import FIGURES
from mlomae.trainer import Trainer

Fields = Mapping[str, Any]
"""Values by dotted field name."""

TINY: dict[str, Any] = {
    "iterations": 4,
    "device": "cpu",
    "log_every": 1,
    "checkpoint_every": 2,
    "picture_every": 100,
    "model.arch": "vit_pico",
    "model.img_size": 8,
    "model.patch_size": 2,
    "model.in_chans": 1,
    "model.decoder_dim": 16,
    "model.decoder_depth": 1,
    "model.decoder_heads": 2,
    "model.pool": "mean",
    "masking.ratio": 0.5,
    "masking.hidden": 8,
    "pretrain.batch_size": 8,
    "head.batch_size": 8,
    "mask.batch_size": 8,
    "hypergradient.every": 1,
}
# Most images are test images: fitting the probe to all others would take longer than the rest of a tiny run.
# For runs whose scores are only compared with each other.
FEW_TO_FIT = {"data.test_fraction": 0.8, "data.heldout_fraction": 0.5}
# Numbers of the clock, which no two runs share.
TIMINGS = ("seconds", *FIGURES)


def tiny_tree(fields: Fields) -> dict[str, Any]:
    """The tiny run as a nested tree, with some fields changed."""
    tree: dict[str, Any] = {}
    for name, value in {**TINY, **fields}.items():
        *sections, leaf = name.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[leaf] = value
    return tree


def tiny_config(fields: Fields) -> Config:
    return Config.model_validate(tiny_tree(fields))


def write_recipe(path: Path, fields: Fields) -> Path:
    """Writes the tiny run, with some fields changed, as a recipe."""
    path.write_text(yaml.safe_dump(tiny_tree(fields)))
    return path


def read_metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without the timings."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in TIMINGS} for row in rows]


def read_result(run_dir: Path) -> dict[str, Any]:
    """result.json without the timings."""
    result = json.loads((run_dir / "result.json").read_text())
    return {name: value for name, value in result.items() if name not in TIMINGS}


class TrainOnly(Trainer):
    """Skips the final evaluation, which takes longer than a tiny training run."""

    def evaluate(self) -> dict[str, Any]:
        return {}


def train(config: Config, world: World | None = None, kind: type[Trainer] = TrainOnly) -> Trainer:
    """Trains a run in this process, without its evaluation unless ``kind`` has one."""
    run_dir = RunDir(config.run_dir, config)
    trainer = kind(config, run_dir, world or join_world(config.device), None)
    run_dir.claim(primary=True)
    try:
        trainer.fit()
    finally:
        run_dir.release()
    return trainer


def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves out the drawing, the slowest part of a tiny run."""

    def draw(self: Trainer) -> None:
        if self.world.primary:
            Image.new("L", (1, 1)).save(self.run_dir.picture)

    monkeypatch.setattr(Trainer, "_draw", draw)


def without_evaluation() -> None:
    """Leaves out, in this process, the final evaluation."""
    setattr(Trainer, "evaluate", TrainOnly.evaluate)  # noqa: B010 - a plain assignment would not type-check


def train_and_meet(end: Callable[[], object], argv: list[str], iteration: int) -> int:
    """Runs ``main``, whose training meets ``end`` before ``iteration``; returns the exit code."""
    iterate = Trainer.iterate

    def last(self: Trainer, current: int) -> object:
        if current == iteration:
            end()
        return iterate(self, current)

    setattr(Trainer, "iterate", last)  # noqa: B010 - a plain assignment would not type-check
    return main(argv)


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(argv: list[str], iteration: int) -> None:
    """Runs ``main`` and kills its own process before ``iteration``, as an outside SIGKILL would."""
    train_and_meet(kill, argv, iteration)
