"""The three levels written with betty-ml, a general library for multilevel optimisation.

The graph of levels is the published method's: the masking network acts on pretraining; the pretrained
encoder acts on the head and on the held-out loss; the head acts on the held-out loss. betty walks
every path from the held-out loss down to the masking network, with one central difference per edge:

* mask, head, pretrain, mask: two evaluations of the head's loss with a backward pass through the whole
  encoder, then two of the pretrain loss;
* mask, pretrain, mask: one backward pass through the whole encoder, then two of the pretrain loss.

The networks, the losses, the optimizer and the batches are ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from betty.configs import Config as Settings
from betty.configs import EngineConfig
from betty.engine import Engine
from betty.problems import ImplicitProblem
from torch import Tensor, nn

from benchmarks.peers.measure import Peer, main
from benchmarks.peers.problem import ReadAhead, Stream, build_modules
from mlomae import objectives
from mlomae.config import Config
from mlomae.data.loader import LevelLoaders
from mlomae.distributed.engine import build_adamw
from mlomae.models.encoder import pool_features
from mlomae.models.selection import MaskPolicy
from mlomae.sections import LevelConfig

Sample = tuple[Tensor, Tensor, int]
"""Images [B, C, H, W], labels [B], number of the batch."""


class Level(ImplicitProblem):
    """What the three problems share. betty gives each of them the other two as attributes."""

    pretrain: Pretrain
    head: Head
    mask: Mask

    def __init__(
        self, name: str, module: nn.Module, rates: LevelConfig, stream: Stream, config: Config, unroll: int
    ) -> None:
        super().__init__(
            name=name,
            config=Settings(type="darts", unroll_steps=unroll),
            module=module,
            optimizer=build_adamw(module, rates),
            train_data_loader=_samples(stream),
        )
        self.pool = config.model.pool

    def trainable_parameters(self) -> list[nn.Parameter]:
        # betty would differentiate the fixed positions too, and move them.
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def patch_optimizer(self) -> None:
        # betty builds the optimizer again from its ``defaults``, which in current torch hold an entry
        # that AdamW does not take (and loses the parameter groups). On one CPU there is nothing to patch.
        pass

    def features(self, images: Tensor) -> Tensor:
        """[B, F], differentiable in the encoder's weights: the path through the head needs it."""
        return pool_features(self.pretrain.module.encoder(images), self.pool)


class Pretrain(Level):
    """Level 1."""

    policy: MaskPolicy

    def training_step(self, sample: Sample) -> Tensor:
        images, _, number = sample
        with torch.no_grad():
            tokens = self.module.encoder.patch_embed(images)
        scores = self.mask(tokens)
        selection = self.policy.select(scores, len(images), number, 0, images.device)
        errors = self.module(images, selection)
        return objectives.pretrain_loss(errors, selection.mask, scores.sigmoid())


class Head(Level):
    """Level 2."""

    def training_step(self, sample: Sample) -> Tensor:
        images, labels, _ = sample
        return objectives.head_loss(self.module(self.features(images)), labels)


class Mask(Level):
    """Level 3."""

    def training_step(self, sample: Sample) -> Tensor:
        images, labels, _ = sample
        return objectives.head_loss(self.head(self.features(images)), labels)


def build(config: Config, folder: Path, iterations: int) -> Peer:
    modules, loaders, steps = build_modules(config), LevelLoaders(config), config.pretrain.unroll_steps
    assert loaders.head is not None and loaders.mask is not None
    lower_stream = ReadAhead(loaders.pretrain, steps * iterations)
    middle_stream, upper_stream = (ReadAhead(s, iterations) for s in (loaders.head, loaders.mask))
    lower = Pretrain("pretrain", modules.autoencoder, config.pretrain, lower_stream, config, steps)
    lower.policy = modules.policy
    middle = Head("head", modules.head, config.head, middle_stream, config, 1)
    upper = Mask("mask", modules.network, config.mask, upper_stream, config, 1)
    dependencies: dict[str, dict[Any, list[Any]]] = {
        "u2l": {upper: [lower]},
        "l2u": {lower: [middle, upper], middle: [upper]},
    }
    engine = Engine([lower, middle, upper], EngineConfig(strategy="cpu"), dependencies)

    def iterate(number: int) -> None:
        # One step of the lowest level each; the last of them also lets the upper levels step.
        for _ in range(steps):
            engine.train_step()

    return Peer(iterate, modules.network.score.weight)


def _samples(stream: Stream) -> Iterator[Sample]:
    while True:
        batch = stream.next()
        assert batch.labels is not None
        yield batch.images, batch.labels, batch.number


if __name__ == "__main__":
    main("betty", build, packages=("betty-ml",))
