"""What does a sweep of eight learning rates cost a linear probe, against one?

On features of the size of CIFAR-10, 50,000 of width 192 and ten classes: by the whole command with features
to compute, by the command where they are there, and by the training of the heads alone. Each takes turns with
one rate. The images are noise, which takes as long as any.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from benchmarks.environment import ROOT
from benchmarks.report import Bar, Report, Row
from benchmarks.timing import interleaved, median_ratio
from mlomae.cli import main
from mlomae.config import dump_config, load_config
from mlomae.downstream.linear import Config
from mlomae.downstream.probe import Heads, ProbePlan
from mlomae.models.encoder import ViTEncoder

pytestmark = pytest.mark.study

ROUNDS, SMOKE_EPOCHS = 3, 2
NUM_TRAIN, NUM_TEST, CLASSES, WIDTH = 50_000, 10_000, 10, 192
SWEEP = Config().lrs
SINGLE = (0.1,)
MAX_RATIO = 1.2


class Commands:
    """``mlomae eval linear`` on an encoder, with features to compute or with those of an earlier call."""

    def __init__(self, folder: Path, images: int, epochs: int) -> None:
        self._folder, self._epochs = folder, epochs
        self._numbers = itertools.count()
        self._run = _write_run(folder, images)
        self._call(SINGLE, "kept")

    def fresh(self, lrs: tuple[float, ...]) -> None:
        """Features and probe."""
        self._call(lrs, f"fresh-{next(self._numbers)}")

    def cached(self, lrs: tuple[float, ...]) -> None:
        """The probe, and reading the features."""
        self._call(lrs, "kept")

    def _call(self, lrs: tuple[float, ...], folder: str) -> None:
        out = self._folder / folder / str(next(self._numbers))
        words = ["--lrs", str(list(lrs)), "--epochs", str(self._epochs), "--device", "cpu", "--out", str(out)]
        assert main(["eval", "linear", str(self._run), *words]) == 0


def _write_run(folder: Path, images: int) -> Path:
    """A run directory with the recipe's encoder as it begins, two tokens wide, and noise for images."""
    rng = np.random.default_rng(0)
    parts = {"train": images, "test": max(CLASSES, images * NUM_TEST // NUM_TRAIN)}
    arrays = {
        f"{part}_images": rng.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)
        for part, count in parts.items()
    }
    labels = {f"{part}_labels": np.arange(count) % CLASSES for part, count in parts.items()}
    np.savez(folder / "noise.npz", **arrays, **labels)
    run = folder / "run"
    overrides = {
        "model.pool": "cls+mean",
        "data.dataset": "medmnist",
        "data.path": str(folder / "noise.npz"),
        "run_dir": str(run),
    }
    config = load_config(ROOT / "recipes" / "cifar10_micro.yaml", overrides)
    run.mkdir()
    (run / "config.yaml").write_text(dump_config(config))
    encoder = ViTEncoder(config.model.arch, config.model.size, config.model.patch_size, 3)
    assert 2 * encoder.embed_dim == WIDTH
    save_file(encoder.state_dict(), run / "encoder.safetensors")
    return run


def _pass(images: int, epochs: int) -> Callable[[tuple[float, ...]], None]:
    """Trains heads on features in memory."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(images, WIDTH, generator=generator)
    labels = torch.randint(CLASSES, (images,), generator=generator)
    plan = ProbePlan(epochs=epochs, batch_size=Config().batch_size)

    def train(lrs: tuple[float, ...]) -> None:
        heads = Heads(lrs, features, labels, CLASSES, plan)
        for epoch in range(epochs):
            heads.train_epoch(epoch)

    return train


def test_linear_sweep(
    request: pytest.FixtureRequest, report: Report, smoke: list[str], tmp_path: Path
) -> None:
    rounds = max(1, request.config.getoption("iterations")) if smoke else ROUNDS
    images, epochs = (2000, SMOKE_EPOCHS) if smoke else (NUM_TRAIN, Config().epochs)
    started = time.perf_counter()
    commands = Commands(tmp_path, images, epochs)
    kinds = {
        "command, features to compute": commands.fresh,
        "command, features kept": commands.cached,
        "training of the heads": _pass(images, epochs),
    }
    functions = {
        f"{kind}, {len(lrs)}": lambda call=call, lrs=lrs: call(lrs)  # type: ignore[misc]  # bound as defaults
        for kind, call in kinds.items()
        for lrs in (SWEEP, SINGLE)
    }

    seconds = interleaved(functions, rounds, warm_up=0)

    rows: list[Row] = []
    ratios = {}
    for kind in kinds:
        sweep, single = seconds[f"{kind}, {len(SWEEP)}"], seconds[f"{kind}, 1"]
        ratios[kind] = median_ratio(sweep, single)
        rows.append(
            {
                "what": kind,
                f"{len(SWEEP)} rates, s": statistics.median(sweep),
                "1 rate, s": statistics.median(single),
                "ratio": ratios[kind],
            }
        )
    title = f"{images:,} features of width {WIDTH}, {CLASSES} classes, {epochs} epochs, {rounds} rounds, CPU"
    report.table(title, rows)
    report.say(f"took {time.perf_counter() - started:,.0f} s")
    if not smoke:
        kind = next(iter(kinds))
        report.check(Bar(f"8 rates against 1: {kind}", ratios[kind], "<=", MAX_RATIO))
