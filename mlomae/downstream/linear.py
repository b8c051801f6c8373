"""A linear classifier on frozen features (linear probe), at several learning rates in one pass."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from mlomae.distributed import collectives
from mlomae.distributed.agreement import Agreement
from mlomae.distributed.env import World
from mlomae.downstream.feature_set import FeatureSet, join
from mlomae.downstream.features import Collected, FeaturesConfig, load_features
from mlomae.downstream.probe import Heads, ProbePlan, best_head
from mlomae.downstream.sections import FAILURE
from mlomae.errors import UserError
from mlomae.interop.pretrained import Pretrained
from mlomae.metrics import MetricsWriter
from mlomae.preemption import Preemption
from mlomae.progress import say
from mlomae.ranges import position
from mlomae.run_dir import RunDir
from mlomae.sections import NonNegative, Positive, Share
from mlomae.tensor_file import read_tensors, write_tensors

SECONDS_BETWEEN_SAVES = 30.0
TOP5_FROM = 10  # more classes than these have a top-5 accuracy
Rate = Annotated[float, Field(gt=0)]


class Config(FeaturesConfig):
    """Evaluation by a linear classifier."""

    lrs: Annotated[tuple[Rate, ...], Field(min_length=1)] = Field(
        (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0),
        description="highest learning rates to try; the held-out images choose. MAE's is blr * batch / 256",
    )
    optimizer: Literal["adamw", "lars"] = Field("adamw", description="lars: MAE's, for large batches")
    epochs: Positive = 100
    batch_size: Positive = Field(1024, description="at most; an epoch is split into batches of equal size")
    warmup: Share = Field(0.1, description="share of the steps spent in linear warm-up, before a cosine to 0")
    weight_decay: NonNegative = Field(0.0, description="of the weights")
    batch_norm: bool = Field(
        True, description="standardise the features by their statistics over all training images"
    )


def run(
    config: Config, pretrained: Pretrained, run_dir: RunDir, world: World, preemption: Preemption
) -> dict[str, Any]:
    """Trains and scores the classifiers on rank 0; called on every rank.

    One classifier per learning rate is trained on the training images. The rate with the lowest cross-entropy
    on the held-out images is chosen, and a classifier trained with it on both, which is tested once.

    Returns:
        Figures on rank 0: ``accuracy`` (and ``top5_accuracy`` where there are more than 10 classes) on the
        test images, ``lr`` chosen, and what each of ``lrs`` reached on the held-out images.

    Raises:
        UserError: see ``load_features``; or every rate is too high.
        Preempted: a signal asked to stop; what was trained is saved.
    """
    collected = load_features(config, pretrained, run_dir, world)
    return _Probe(config, collected, run_dir, world, preemption).run()


class _Probe:
    """The two trainings of a linear probe. Only rank 0 has features; all agree on when to stop."""

    def __init__(
        self, config: Config, collected: Collected, run_dir: RunDir, world: World, preemption: Preemption
    ) -> None:
        self.config, self.collected, self.world, self.preemption = config, collected, world, preemption
        self.run_dir = run_dir
        self.plan = ProbePlan(
            config.optimizer, config.epochs, config.batch_size, config.warmup, config.weight_decay,
            config.batch_norm, config.seed,
        )  # fmt: skip
        self.agreement = Agreement(FAILURE.stuck_after)
        # Epochs of both trainings that are done, and what the first one found.
        self.state: dict[str, Any] = {"done": 0, "best": None, "data": collected.digest}
        self.tensors: dict[str, Tensor] = {}
        self.saved = time.monotonic()

    @property
    def checkpoint(self) -> Path:
        return self.run_dir.path / "checkpoint.safetensors"

    def run(self) -> dict[str, Any]:
        """See ``run`` of this module."""
        collectives.on_primary(self._restore)
        self.state = collectives.broadcast_object(self.state)
        images = _Images.of(self.collected, self.world.device) if self.world.primary else None
        epochs, lrs = self.config.epochs, self.config.lrs
        shown = {"": {"loss": "loss {:.4f}".format, "lr": "lr {:.2g}".format}}
        figures: dict[str, Any] = {}
        writer = MetricsWriter(
            self.run_dir, self.config, self.world.primary, 2 * epochs, self.state["done"], shown
        )
        with closing(writer):
            if self.state["best"] is None:
                heads = self._train(0, lrs, None if images is None else images.train, writer)
                collectives.on_primary(lambda: self._choose(heads, images))
                self.state = collectives.broadcast_object(self.state)
            lr = lrs[self.state["best"]]
            chosen = self._train(epochs, [lr], None if images is None else images.both, writer)
            collectives.on_primary(lambda: figures.update(self._test(chosen)))
            writer.result(figures)
        return figures

    def _train(
        self, before: int, lrs: Sequence[float], images: FeatureSet | None, writer: MetricsWriter
    ) -> Heads | None:
        """One of the two trainings, from where it stopped; ``before`` are the epochs of the one before it."""
        heads = None
        if images is not None:
            heads = Heads(lrs, images.features, images.labels, self.collected.classes, self.plan)
            if self.tensors:
                heads.load_state(self.tensors)
                self.tensors = {}
        with self.preemption.deferred():
            for epoch in range(self.state["done"] - before, self.config.epochs):
                position.begin(before + epoch)
                losses = None if heads is None else heads.train_epoch(epoch)
                self.state["done"] += 1
                stop = self.agreement.anywhere(self.preemption.requested)
                if losses is not None and (epoch + 1) % self.config.log_every == 0:
                    self._log(losses.cpu(), lrs, writer)
                self._save(heads, stop)
                if stop:
                    raise self.preemption.stopped(f"epoch {self.state['done']}")
        return heads

    def _log(self, losses: Tensor, lrs: Sequence[float], writer: MetricsWriter) -> None:
        """Tells of the classifier that has learned most so far."""
        losses = losses.nan_to_num(nan=float("inf"))
        best = int(losses.argmin())
        writer.log(self.state["done"], {"loss": float(losses[best]), "lr": lrs[best]})

    def _save(self, heads: Heads | None, stop: bool) -> None:
        """Writes down how far the training is, now and then; called on every rank."""
        due = time.monotonic() - self.saved >= SECONDS_BETWEEN_SAVES or stop
        if collectives.broadcast_object(due):
            collectives.on_primary(lambda: write_tensors(self.checkpoint, _of(heads).state(), self.state))
            self.saved = time.monotonic()

    def _restore(self) -> None:
        """Takes up what was saved, if it was of these images: else it is soon computed anew."""
        tensors, state = read_tensors(self.checkpoint) or ({}, {})
        if state.get("data") == self.state["data"]:
            self.tensors, self.state = tensors, state

    def _choose(self, heads: Heads | None, images: _Images | None) -> None:
        """Takes the rate that is best on the held-out images."""
        assert images is not None
        lrs, scores = self.config.lrs, _of(heads).score(images.heldout.features, images.heldout.labels)
        best = best_head(scores)
        if best is None:
            raise UserError(f"lrs: none of {list(lrs)} leads to finite numbers; give lower ones")
        if len(lrs) > 2 and lrs[best] in (min(lrs), max(lrs)):
            say(
                self.config.display,
                f"lrs: the best one, {lrs[best]}, is an end of the list; those beyond it may be better",
            )
        self.state |= {"best": best, "accuracies": scores.accuracy.tolist(), "losses": scores.loss.tolist()}

    def _test(self, heads: Heads | None) -> dict[str, Any]:
        test, best, device = self.collected.parts["test"], self.state["best"], self.world.device
        scores = _of(heads).score(test.features.to(device), test.labels.to(device))
        top5 = {"top5_accuracy": scores.top5.item()} if self.collected.classes > TOP5_FROM else {}
        return {
            "accuracy": scores.accuracy.item(),
            **top5,
            "lr": self.config.lrs[best],
            "heldout_accuracy": self.state["accuracies"][best],
            "lrs": list(self.config.lrs),
            "heldout_accuracies": self.state["accuracies"],
            "heldout_losses": self.state["losses"],
            "bad_samples": self.collected.bad_samples,
        }


@dataclass(frozen=True)
class _Images:
    """The labelled training images and the held-out ones on the device, as parts of both together."""

    train: FeatureSet
    heldout: FeatureSet
    both: FeatureSet

    @classmethod
    def of(cls, collected: Collected, device: torch.device) -> _Images:
        parts = [collected.parts["labelled"], collected.parts["heldout"]]
        both, count = join(parts, device), len(parts[0])
        return cls(both[:count], both[count:], both)


def _of(heads: Heads | None) -> Heads:
    assert heads is not None, "rank 0 has them"
    return heads
