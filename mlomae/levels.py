"""The three levels: each owns its engine, data stream and loss, and knows how to take one step.

Lower to upper: pretrain (autoencoder, theta) → head (classifier, w) → mask (masking network, phi).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mlomae import objectives
from mlomae.config import Config, LevelConfig
from mlomae.data.loader import Batch, Stream
from mlomae.distributed import collectives
from mlomae.distributed.engine import Engine, trainable
from mlomae.mlo.direction import Direction, HeadProblem, Weights, encoder_direction
from mlomae.mlo.influence import central_difference
from mlomae.mlo.perturb import global_norm
from mlomae.mlo.schedule import warmup_cosine
from mlomae.models.encoder import pool_features
from mlomae.models.mae import MaskedAutoencoder
from mlomae.models.masking import MaskingNetwork
from mlomae.models.selection import MaskPolicy, PatchSelection

Metrics = dict[str, Tensor]
"""Scalars by name, 0-dim tensors on the device."""
Rates = TypeVar("Rates", bound=LevelConfig)


@dataclass(frozen=True)
class MaskedBatch:
    """One pretrain batch and its mask: at which the mask level differentiates the pretrain step.

    The mixed derivative is taken at these images, tokens and kept patches and at the weights after the
    last pretrain step, as if that step had been plain gradient descent.

    Attributes:
        images: [B, C, H, W].
        selection: the patches kept.
        tokens: [B, L, D] input of the masking network, frozen; None for policies that do not learn.
        scores: [B, L] of the masking network, constant; None for policies that do not learn.
    """

    images: Tensor
    selection: PatchSelection
    tokens: Tensor | None
    scores: Tensor | None


class Level(Generic[Rates]):
    """What all levels share: an engine, a stream of batches, and a schedule."""

    def __init__(self, engine: Engine, stream: Stream, rates: Rates, config: Config) -> None:
        self.engine = engine
        self.stream = stream
        self.rates = rates
        self.iterations = config.iterations

    def lr(self, iteration: int) -> float:
        """The learning rate of this level in one outer iteration."""
        r = self.rates
        return warmup_cosine(iteration, self.iterations, r.lr, r.min_lr, r.warmup)

    def weight_norm(self) -> Tensor:
        """Norm of the trainable weights, 0-dim; not finite once a step has broken them."""
        return global_norm(parameters_of(self.engine.module))

    def next_batch(self, device: torch.device) -> Batch:
        """The stream's next batch, on the device."""
        batch = self.stream.next()
        labels = None if batch.labels is None else batch.labels.to(device, non_blocking=True)
        return replace(batch, images=batch.images.to(device, non_blocking=True), labels=labels)


class PretrainLevel(Level[LevelConfig]):
    """Level 1: reconstruct the removed patches, weighted by the mask probabilities."""

    def __init__(
        self,
        engine: Engine,
        stream: Stream,
        config: Config,
        policy: MaskPolicy,
        masking_network: MaskingNetwork | None,
    ) -> None:
        super().__init__(engine, stream, config.pretrain, config)
        self.policy = policy
        self.masking_network = masking_network

    @property
    def autoencoder(self) -> MaskedAutoencoder:
        assert isinstance(self.engine.module, MaskedAutoencoder)
        return self.engine.module

    def step(self, batch: Batch, iteration: int) -> tuple[MaskedBatch, Metrics]:
        """One optimizer step of the autoencoder on one batch."""
        masked = self.mask(batch)
        mask = masked.selection.mask
        errors = self.engine(masked.images, masked.selection)
        weights = None if masked.scores is None else masked.scores.sigmoid()
        loss = objectives.pretrain_loss(errors, mask, weights)
        self.engine.descend(loss, self.lr(iteration))
        unweighted = objectives.pretrain_loss(errors.detach(), mask, None)
        return masked, {"loss/pretrain": loss.detach(), "loss/reconstruction": unweighted}

    @torch.no_grad()
    def mask(self, batch: Batch) -> MaskedBatch:
        """Chooses the patches of a batch; a function of the batch and its number."""
        images = batch.images
        tokens, scores = self.score(images)
        selection = self.policy.select(scores, len(images), batch.number, batch.first_row, images.device)
        return MaskedBatch(images, selection, tokens, scores)

    @torch.no_grad()
    def score(self, images: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The masking network's input [B, L, D] and output [B, L]; None without a network."""
        if self.masking_network is None:
            return None, None
        tokens = self.autoencoder.encoder.patch_embed(images)
        return tokens, self.masking_network(tokens)


class HeadLevel(Level[LevelConfig]):
    """Level 2: classify the train batch from the encoder's features."""

    def step(self, features: Tensor, labels: Tensor, iteration: int) -> Metrics:
        """One optimizer step of the head; the features [B, D] are constant."""
        logits = self.engine(features)
        loss = objectives.head_loss(logits, labels)
        self.engine.descend(loss, self.lr(iteration))
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        return {"loss/head": loss.detach(), "accuracy/head": accuracy}

    def problem(self, lr: float, levels: int) -> HeadProblem:
        """This level as the mask level sees it."""
        module = self.engine.module

        def loss(weights: Weights, features: Tensor, labels: Tensor) -> Tensor:
            return objectives.head_loss(functional_call(module, weights, (features,)), labels)

        return HeadProblem(loss, dict(module.named_parameters()), lr, levels)


class MaskLevel(Level[LevelConfig]):
    """Level 3: move the masking network along the hypergradient of the held-out loss."""

    def __init__(
        self, engine: Engine, stream: Stream, config: Config, pretrain: PretrainLevel, head: HeadLevel
    ) -> None:
        super().__init__(engine, stream, config.mask, config)
        self.pretrain = pretrain
        self.head = head
        self.levels = config.levels
        self.pool = config.model.pool
        self.radius = config.hypergradient.radius

    def direction(self, train: Batch, heldout: Batch, iteration: int) -> Direction:
        """v: how the held-out loss changes with the encoder's weights (all ranks agree on it)."""
        assert train.labels is not None and heldout.labels is not None
        encoder = self.pretrain.autoencoder.encoder

        def encode(images: Tensor) -> Tensor:
            with self.pretrain.engine.autocast():
                tokens = encoder(images)
            # The head's own derivatives are taken outside autocast: they are exact and cost nothing.
            return pool_features(tokens, self.pool).to(images.dtype)

        return encoder_direction(
            encode,
            parameters_of(encoder),
            self.head.problem(self.head.lr(iteration), self.levels),
            (train.images, train.labels),
            (heldout.images, heldout.labels),
            collectives.average,
        )

    def influence(self, masked: MaskedBatch, direction: Direction) -> tuple[Tensor, Metrics]:
        """Derivative of each patch's error [B, L] along v, at the frozen selection, without autocast."""
        autoencoder = self.pretrain.autoencoder

        def errors() -> Tensor:
            return autoencoder(masked.images, masked.selection)

        with full_precision():
            result = central_difference(
                errors, parameters_of(autoencoder.encoder), direction.values, self.radius
            )
        return result.values, {"hypergradient/direction_norm": result.direction_norm}

    def step(self, masked: MaskedBatch, direction: Direction, iteration: int) -> Metrics:
        """One optimizer step of the masking network."""
        influence, metrics = self.influence(masked, direction)
        probability = self.engine(masked.tokens).sigmoid()
        loss = objectives.mask_loss(
            probability, masked.selection.mask, influence, self.pretrain.lr(iteration)
        )
        self.engine.descend(loss, self.lr(iteration))
        norm = torch.as_tensor(self.engine.grad_norm, dtype=torch.float32, device=influence.device)
        return {"loss/mask": direction.heldout_loss, "hypergradient/norm": norm, **metrics}


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products without TF32, whose rounding would drown a finite difference.

    cuDNN's convolutions, and with them the patch projection, use TF32 unless told otherwise.
    """
    # torch.backends.cudnn replaces itself by an object that has more attributes than the module.
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def parameters_of(module: nn.Module) -> list[Tensor]:
    """The trainable parameters, in module order."""
    return [parameter for _, parameter in trainable(module)]


def mean_of(metrics: Iterable[Metrics]) -> Metrics:
    """Averages metrics of several steps by name."""
    rows = list(metrics)
    return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}
