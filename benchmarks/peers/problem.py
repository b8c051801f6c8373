"""The problem that all peers solve: sizes, images, batches and modules, the same for each of them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch.nn import functional as F

from mlomae.config import Config, load_config
from mlomae.data.batches import Batch
from mlomae.models.encoder import SIZES as ENCODERS
from mlomae.models.encoder import num_pooled
from mlomae.models.head import ClassifierHead
from mlomae.models.mae import MaskedAutoencoder
from mlomae.models.masking import MaskingNetwork, build_masking_network
from mlomae.models.selection import MaskPolicy
from mlomae.random import stream_seed

NUM_CLASSES = 10
NUM_IMAGES = 1000
SIDE = 32

# Constant rates: the peers know no schedule, and a warm-up would begin with steps of almost nothing.
_COMMON = {
    "iterations": "1000000", "device": "cpu", "data.dataset": "folder", "model.img_size": str(SIDE),
    "model.in_chans": "3", "masking.ratio": "0.75", "pretrain.unroll_steps": "2",
    "pretrain.warmup": "0", "head.warmup": "0", "mask.warmup": "0",
}  # fmt: skip


@dataclass(frozen=True)
class Size:
    """One size of the problem, and how long to measure it.

    Attributes:
        overrides: of the default configuration.
        batch: images per step, the same at all levels.
        processes: how often each peer is started, one after the other.
        rounds: measured in each process.
        warm_up: outer iterations before the first round.
    """

    overrides: dict[str, str]
    batch: int
    processes: int
    rounds: int
    warm_up: int


SIZES = {
    # The model of recipes/cifar10_micro.yaml.
    "tiny": Size(
        {"model.arch": "vit_micro", "model.patch_size": "4", "model.decoder_dim": "96",
         "model.decoder_depth": "2", "model.decoder_heads": "4"},
        batch=128, processes=3, rounds=3, warm_up=4,
    ),
    # ViT-B on CIFAR's images: the size of the paper.
    "vit-b": Size(
        {"model.arch": "vit_base", "model.patch_size": "2", "model.decoder_dim": "512",
         "model.decoder_depth": "8", "model.decoder_heads": "16"},
        batch=8, processes=1, rounds=2, warm_up=1,
    ),
    # ImageNet's images; for plain steps.
    "vit-b16": Size(
        {"model.arch": "vit_base", "model.img_size": "224", "model.patch_size": "16",
         "model.decoder_dim": "512", "model.decoder_depth": "8", "model.decoder_heads": "16"},
        batch=8, processes=4, rounds=3, warm_up=1,
    ),
}  # fmt: skip

NETWORKS = {
    "token": {"masking.network": "token"},
    "mlp": {"masking.network": "mlp", "masking.hidden": "512"},
}
"""Masking networks: the default one, and the paper's."""

OURS: dict[str, dict[str, str]] = {
    "full": {"levels": "3", "hypergradient.every": "1"},
    "default": {},
    "plain": {"masking.policy": "random"},
}
"""Overrides of our trainer's variants; ``plain`` takes plain MAE steps only."""

CYCLES = {"default": 4}
"""Outer iterations after which a variant's work repeats; 1 where it is not listed."""


class Stream(Protocol):
    """Where a level's batches come from."""

    def next(self) -> Batch: ...


class ReadAhead:
    """A stream whose next batches lie in memory: decoding images is no part of what is compared."""

    def __init__(self, stream: Stream, batches: int) -> None:
        self._stream = stream
        self._ready = deque(stream.next() for _ in range(batches))

    def next(self) -> Batch:
        return self._ready.popleft() if self._ready else self._stream.next()


def configure(size: str, network: str, images: Path, overrides: dict[str, str] | None = None) -> Config:
    """The configuration of one size, on the images in a folder."""
    chosen = SIZES[size]
    batches = {f"{level}.batch_size": str(chosen.batch) for level in ("pretrain", "head", "mask")}
    tree = {**_COMMON, **chosen.overrides, **batches, **NETWORKS[network], "data.path": str(images)}
    return load_config(None, {**tree, **(overrides or {})})


def write_images(folder: Path) -> None:
    """Smooth random pictures in as many class folders as there are classes: no download."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(NUM_IMAGES, 3, 4, 4, generator=generator)
    smooth = F.interpolate(coarse, size=(SIDE, SIDE), mode="bilinear")
    noisy = (smooth + 0.1 * torch.rand(smooth.shape, generator=generator)).clamp(0, 1)
    pixels = (255 * noisy).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    for number, picture in enumerate(pixels):
        path = folder / f"class-{number % NUM_CLASSES}" / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.numpy()).save(path)


@dataclass(frozen=True)
class Modules:
    """The networks of the three levels, and how the masking network's scores become a selection."""

    autoencoder: MaskedAutoencoder
    head: ClassifierHead
    network: MaskingNetwork
    policy: MaskPolicy


def build_modules(config: Config) -> Modules:
    """The modules of ``mlomae.build``, with the same weights."""
    model = config.model
    embed_dim = ENCODERS[model.arch][0]
    torch.manual_seed(stream_seed(config.seed, "init", "pretrain"))
    autoencoder = MaskedAutoencoder(model)
    torch.manual_seed(stream_seed(config.seed, "init", "head"))
    head = ClassifierHead(num_pooled(embed_dim, model.pool), NUM_CLASSES)
    torch.manual_seed(stream_seed(config.seed, "init", "mask"))
    network = build_masking_network(config.masking, model.grid, embed_dim)
    policy = MaskPolicy(config.masking, model.grid, config.num_keep, config.seed)
    return Modules(autoencoder, head, network, policy)
