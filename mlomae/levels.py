"""The levels: each owns its engine, data stream and loss, and knows how to take one step.

Lower to upper: pretrain (autoencoder, theta) → head (classifier, w) → mask (masking network, phi). Policy
``hard`` has no upper levels: beside the pretrain level stands one that trains the masking network.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from mlomae import objectives
from mlomae.compilation import eagerly
from mlomae.config import Config
from mlomae.data.batches import Batch
from mlomae.data.stream import Stream
from mlomae.distributed import collectives
from mlomae.distributed.engine import Engine
from mlomae.hypergradient import Hypergradient, InfluenceSample, MaskedBatch, Metrics
from mlomae.mlo.best_response import HeadProblem, Weights
from mlomae.mlo.direction import Direction
from mlomae.mlo.schedule import warmup_cosine
from mlomae.models.mae import MaskedAutoencoder
from mlomae.models.masking import MaskingNetwork
from mlomae.models.selection import MaskPolicy
from mlomae.ranges import profiled
from mlomae.sections import LevelConfig
from mlomae.statistics import mask_agreement, score_statistics

Rates = TypeVar("Rates", bound=LevelConfig)


class Level(Generic[Rates]):
    """What all levels share: an engine and a schedule."""

    def __init__(self, engine: Engine, rates: Rates, config: Config) -> None:
        self.engine = engine
        self.rates = rates
        self.iterations = config.iterations

    def lr(self, iteration: int) -> float:
        """The learning rate of this level in one outer iteration."""
        r = self.rates
        return warmup_cosine(iteration, self.iterations, r.lr, r.min_lr, r.warmup)


class ReadingLevel(Level[Rates]):
    """A level with a stream of batches of its own."""

    def __init__(self, engine: Engine, stream: Stream, rates: Rates, config: Config) -> None:
        super().__init__(engine, rates, config)
        self.stream = stream

    def next_batch(self) -> Batch:
        """The stream's next batch, on the device."""
        return self.stream.next()


class PretrainLevel(ReadingLevel[LevelConfig]):
    """Level 1: reconstruct the removed patches; weighted by the mask probabilities where they are learned."""

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
        self.weighted = config.masking.learns
        self.label_weight = config.pretrain.label_weight
        self.preconditions = config.hypergradient.precondition == "adam"
        self.micro_batches = config.pretrain.micro_batches

    @property
    def autoencoder(self) -> MaskedAutoencoder:
        assert isinstance(self.engine.module, MaskedAutoencoder)
        return self.engine.module

    def step(self, batch: Batch, iteration: int, record: bool = False) -> tuple[MaskedBatch, Metrics]:
        """One optimizer step of the autoencoder on one batch.

        Args:
            record: whether the mask level will differentiate this step.
        """
        with profiled("selection"):
            masked = self.mask(batch)
        return self.step_masked(masked, iteration, record)

    def step_masked(
        self, masked: MaskedBatch, iteration: int, record: bool = False
    ) -> tuple[MaskedBatch, Metrics]:
        """``step`` on a batch whose patches are chosen."""
        *parts, last = masked.split(self.micro_batches)
        figures, errors = list[Metrics](), list[Tensor]()

        def loss_of(part: MaskedBatch) -> Tensor:
            loss, found, metrics = self._loss(part)
            figures.append({"loss/pretrain": loss.detach(), **metrics})
            errors.append(found)
            return loss

        for part in parts:
            self.engine.accumulate(loss_of(part))
        loss = loss_of(last)
        lr = self.lr(iteration)
        with profiled("pretrain/descend"):
            if record:
                step = self.engine.descend_recorded(loss, lr, slope=self.preconditions)
                masked = replace(masked, step=step)
            else:
                self.engine.descend(loss, lr)
        whole = torch.cat(errors)
        unweighted = objectives.pretrain_loss(whole, masked.selection.mask, None)
        return replace(masked, errors=whole), {**mean_of(figures), "loss/reconstruction": unweighted}

    def _loss(self, masked: MaskedBatch) -> tuple[Tensor, Tensor, Metrics]:
        """The loss of a micro-batch, its errors [B, L] without graph, and figures of its labels."""
        mask, labels = masked.selection.mask, masked.labels
        weights = masked.scores.sigmoid() if self.weighted and masked.scores is not None else None
        with profiled("pretrain/forward"):
            if labels is None:
                errors = self.engine(masked.images, masked.selection)
                return objectives.pretrain_loss(errors, mask, weights), errors.detach(), {}
            errors, logits = self.engine(masked.images, masked.selection, True)
            label_loss = objectives.head_loss(logits, labels)
            loss = objectives.pretrain_loss(errors, mask, weights) + self.label_weight * label_loss
            accuracy = objectives.head_accuracy(logits, labels)
        return loss, errors.detach(), {"loss/label": label_loss.detach(), "accuracy/label": accuracy}

    @torch.no_grad()
    def mask(self, batch: Batch) -> MaskedBatch:
        """Chooses the patches of a batch; a function of the batch and its number."""
        images = batch.images
        tokens, scores = mask_scores(self.autoencoder, self.masking_network, images)
        selection = self.policy.select(scores, len(images), batch.number, batch.first_row, images.device)
        labels = batch.labels if self.label_weight else None
        return MaskedBatch(images, selection, tokens, scores, labels=labels)

    def statistics(self, masked: MaskedBatch) -> tuple[Tensor, Metrics]:
        """How often each position is removed [L], over all ranks, and figures of the masks and scores."""
        batch_size = self.rates.batch_size
        (frequency,) = collectives.average([masked.selection.mask.mean(dim=0)])
        figures = {"mask/agreement": mask_agreement(frequency, batch_size)}
        if masked.scores is not None:
            # What the scores alone would remove: noise must not hide that they agree on everything.
            noiseless = self.policy.keep_lowest(masked.scores).mask
            (noiseless,) = collectives.average([noiseless.mean(dim=0)])
            figures["mask/agreement_noiseless"] = mask_agreement(noiseless, batch_size)
            figures |= score_statistics(masked.scores, self.policy.config.logit_bound)
        return frequency, figures


class HeadLevel(ReadingLevel[LevelConfig]):
    """Level 2: classify the train batch, its images or their pixels, from the encoder's features."""

    def __init__(self, engine: Engine, stream: Stream, config: Config) -> None:
        super().__init__(engine, stream, config.head, config)
        self.response = config.hypergradient.best_response if config.levels == 3 else "frozen"
        self.damping = config.hypergradient.damping

    def step(self, features: Tensor, labels: Tensor, iteration: int) -> Metrics:
        """One optimizer step of the head; the features [B, …] are constant."""
        with profiled("head/step"):
            logits = self.engine(features)
            loss = objectives.head_loss(logits, labels)
            self.engine.descend(loss, self.lr(iteration))
            accuracy = objectives.head_accuracy(logits, labels)
        return {"loss/head": loss.detach(), "accuracy/head": accuracy}

    def problem(self, iteration: int) -> HeadProblem:
        """This level as the mask level sees it in one outer iteration."""
        module = self.engine.whole_module()

        def loss(weights: Weights, features: Tensor, labels: Tensor) -> Tensor:
            # Second derivatives of the head are taken, which compiled modules do not have.
            with eagerly():
                return objectives.head_loss(functional_call(module, weights, (features,)), labels)

        weights = {name: weight.detach() for name, weight in module.named_parameters()}
        return HeadProblem(loss, weights, self.response, self.lr(iteration), self.damping)


class MaskLevel(ReadingLevel[LevelConfig]):
    """Level 3: move the masking network along the hypergradient of the held-out loss."""

    def __init__(
        self, engine: Engine, stream: Stream, config: Config, pretrain: PretrainLevel, head: HeadLevel
    ) -> None:
        super().__init__(engine, stream, config.mask, config)
        self.pretrain = pretrain
        self.share = config.hypergradient.share
        self.hypergradient = Hypergradient(config, pretrain.engine, head.problem)
        self.influence: InfluenceSample | None = None  # of the last hypergradient of this process

    def step(self, masked: MaskedBatch, direction: Direction, iteration: int) -> Metrics:
        """One optimizer step of the masking network."""
        part = masked.first(self.share)
        with profiled("influence"):
            influence, metrics = self.hypergradient.influence(part, direction)
            self.influence = InfluenceSample.of(iteration, part, influence)
        with profiled("mask/step"):
            probability = self.engine(part.tokens).sigmoid()
            lr = self.pretrain.lr(iteration)
            loss = objectives.mask_loss(probability, part.selection.mask, influence, lr)
            self.engine.descend(loss, self.lr(iteration))
        norm = torch.as_tensor(self.engine.grad_norm, dtype=torch.float32, device=influence.device)
        return {"loss/mask": direction.heldout_loss, "hypergradient/norm": norm, **metrics}


class HardnessLevel(Level[LevelConfig]):
    """Beside level 1 under policy ``hard``: the masking network learns to rank patches by their errors."""

    def __init__(self, engine: Engine, config: Config) -> None:
        super().__init__(engine, config.mask, config)

    def step(self, masked: MaskedBatch, iteration: int) -> Metrics:
        """One optimizer step of the masking network on a batch whose errors are known."""
        assert masked.tokens is not None and masked.errors is not None
        with profiled("mask/step"):
            scores = self.engine(masked.tokens)
            loss = objectives.hardness_loss(scores, masked.selection.mask, masked.errors)
            self.engine.descend(loss, self.lr(iteration))
        return {"loss/hardness": loss.detach()}


@torch.no_grad()
def mask_scores(
    autoencoder: MaskedAutoencoder, network: nn.Module | None, images: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The masking network's input [B, L, D] and output [B, L]; None without a network."""
    if network is None:
        return None, None
    tokens = autoencoder.encoder.patch_embed(images)
    return tokens, network(tokens)


def mean_of(metrics: Iterable[Metrics]) -> Metrics:
    """Averages metrics of several steps by name."""
    rows = list(metrics)
    return {name: torch.stack([row[name] for row in rows]).mean() for name in rows[0]}
