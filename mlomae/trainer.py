"""The trainer: the order of events of a run. It knows no formula and no engine."""

from __future__ import annotations

import gc
import time
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from mlomae import checkpoint
from mlomae.bad_samples import BadSamples
from mlomae.build import build_levels, describe_implementations
from mlomae.compilation import eagerly
from mlomae.config import Config
from mlomae.data.batches import Batch
from mlomae.data.loader import LevelLoaders
from mlomae.distributed import collectives
from mlomae.distributed.engine import state_shapes, weights_of
from mlomae.distributed.env import World
from mlomae.errors import UserError
from mlomae.evaluate import evaluate_features, pixels
from mlomae.hypergradient import MaskedBatch, Metrics
from mlomae.levels import Level, mean_of
from mlomae.logbook import Logbook
from mlomae.meters import FiniteGuard, Meters
from mlomae.metrics import MetricsWriter
from mlomae.precision import resolve_precision
from mlomae.ranges import profiled
from mlomae.run_dir import RunDir
from mlomae.statistics import mask_agreement, score_statistics
from mlomae.telemetry import Telemetry, run_telemetry

NUM_PREVIEW_IMAGES = 8
# Scalars on the screen, in order.
SHOWN = {
    "loss/pretrain": "pretrain {:.4f}",
    "loss/head": "head {:.3f}",
    "loss/mask": "mask {:.3f}",
    "mask/entropy": "entropy {:.3f}",
    "mask/agreement": "agreement {:.3f}",
    "images_per_second": "{:,.0f} img/s",
}


class Trainer:
    """One run: K pretrain steps → head step → mask step per outer iteration, then evaluation."""

    def __init__(
        self, config: Config, run_dir: RunDir, world: World, ds_config: dict[str, Any] | None
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.world = world
        self.loaders = LevelLoaders(config, world.rank, world.size, world.device)
        self.precision = resolve_precision(config.compute.precision, world.device, ds_config)
        self.levels = build_levels(config, self.loaders, world, ds_config, self.precision)
        self.implementations = describe_implementations(config, world, self.precision)
        self.telemetry: Telemetry | None = None
        self.bad_samples = BadSamples(self.loaders.ledger, run_dir.bad_samples)
        self.meters = Meters()
        self.guard = FiniteGuard()
        self.iteration = 0
        self.seconds = 0.0

    def fit(self) -> dict[str, Any]:
        """Trains from the last checkpoint, if there is one, to the end and evaluates.

        Returns:
            The content of ``result.json`` (on rank 0; empty elsewhere).

        Raises:
            UserError: a loss stopped being finite; the last checkpoint is kept.
        """
        trained = self.resume() or self.precision
        if trained != self.precision:
            raise UserError(
                f"compute.precision: the checkpoint was trained in {trained}, this run would use "
                f"{self.precision}; set compute.precision to {trained}"
            )
        if self.world.primary:
            print(self.implementations)
            print(self.loaders.describe(), flush=True)
        config = self.config
        self.bad_samples.restore()
        writer = MetricsWriter(self.run_dir, self.world.primary, config.iterations, self.iteration, SHOWN)
        logbook = Logbook(writer, self.guard)
        try:
            self.telemetry = self.start_telemetry()
            # What lives now lives to the end: no collection has to look at it again.
            gc.collect()
            gc.freeze()
            while self.iteration < config.iterations:
                started = time.perf_counter()
                masked = self.iterate(self.iteration)
                self.iteration += 1
                self._finish_iteration(masked, writer, logbook, started)
            return self.evaluate()
        except (KeyboardInterrupt, UserError):
            logbook.write_waiting()
            self.bad_samples.write_own()
            raise
        finally:
            gc.unfreeze()
            writer.close()
            self.loaders.close()

    def start_telemetry(self) -> Telemetry:
        """Measures what the device can do; figures count from here."""
        mask = self.levels.mask
        estimator = None if mask is None else mask.hypergradient.estimator
        return run_telemetry(self.config, self.world, self.precision, self.loaders.num_classes, estimator)

    def _next_batch(self, level: Level[Any]) -> Batch:
        waiting = nullcontext() if self.telemetry is None else self.telemetry.waiting()
        with waiting, profiled("data"):
            return level.next_batch()

    def iterate(self, iteration: int) -> MaskedBatch:
        """One outer iteration; returns the last pretrain batch with its mask."""
        levels, unroll_steps = self.levels, self.config.pretrain.unroll_steps
        due = levels.mask is not None and levels.mask.hypergradient.due(iteration)
        steps: list[Metrics] = []
        for number in range(unroll_steps):
            batch = self._next_batch(levels.pretrain)
            record = due and number == unroll_steps - 1
            masked, metrics = levels.pretrain.step(batch, iteration, record)
            steps.append(metrics)
        scalars = mean_of(steps)
        if levels.mask is not None and levels.head is not None:
            train = self._next_batch(levels.head)
            assert train.labels is not None
            if due:
                heldout = self._next_batch(levels.mask)
                with profiled("direction"):
                    direction = levels.mask.hypergradient.direction(train, heldout, iteration)
                features = direction.train_features
            else:
                with torch.no_grad(), profiled("head/features"):
                    features = levels.mask.hypergradient.features(train.images)
            scalars |= levels.head.step(features, train.labels, iteration)
            if due:
                scalars |= levels.mask.step(masked, direction, iteration)
        for name, level in levels.by_name().items():
            if f"loss/{name}" in scalars:
                self.guard.watch(name, iteration, scalars[f"loss/{name}"], level.weight_norm())
        self.meters.add(scalars)
        return masked

    def _finish_iteration(
        self, masked: MaskedBatch, writer: MetricsWriter, logbook: Logbook, started: float
    ) -> None:
        """Logs, draws and saves where this iteration calls for it."""
        config, done = self.config, self.iteration
        last = done == config.iterations
        due = {
            name: last or done % every == 0
            for name, every in (
                ("log", config.log_every),
                ("picture", config.picture_every),
                ("checkpoint", config.checkpoint_every),
            )
        }
        # The meters are empty at a checkpoint, so that a resumed run logs what an uninterrupted one does.
        due["log"] |= due["checkpoint"]
        submitted = time.perf_counter() - started
        assert self.telemetry is not None
        self.telemetry.iterated(submitted)
        if due["log"]:
            self._log(masked, logbook)
        if due["checkpoint"] or due["picture"]:
            # Before anything is written: a broken checkpoint must not replace a good one.
            logbook.flush()
            self.guard.check()
            self.bad_samples.exchange()
        # With the waits for the device, without saving and drawing.
        spent = time.perf_counter() - started
        self.seconds += spent
        self.telemetry.waited_for_device(spent - submitted)
        if due["checkpoint"]:
            self.save()
        if due["picture"] and self.world.primary:
            self._draw()
            writer.image(done, self.run_dir.picture)

    def _log(self, masked: MaskedBatch, logbook: Logbook) -> None:
        batch_size = self.config.pretrain.batch_size
        (frequency,) = collectives.average([masked.selection.mask.mean(dim=0)])
        statistics = {"mask/agreement": mask_agreement(frequency, batch_size)}
        if masked.scores is not None:
            # What the scores alone would remove: noise must not hide that they agree on everything.
            noiseless = self.levels.pretrain.policy.keep_lowest(masked.scores).mask
            (noiseless,) = collectives.average([noiseless.mean(dim=0)])
            statistics["mask/agreement_noiseless"] = mask_agreement(noiseless, batch_size)
            statistics |= score_statistics(masked.scores, self.config.masking.logit_bound)
        figures: dict[str, float] = {
            f"lr/{name}": level.lr(self.iteration - 1) for name, level in self.levels.by_name().items()
        }
        figures["bad_samples"] = len(self.loaders.ledger)
        if self.telemetry is not None:
            figures |= self.telemetry.read()
        logbook.begin(self.iteration, {**self.meters.take(), **statistics}, frequency, figures)

    @property
    def images_per_second(self) -> float:
        """Pretrain images per second of training time, evaluation and pictures left out."""
        images = self.iteration * self.config.pretrain.unroll_steps * self.config.pretrain.batch_size
        return images / max(self.seconds, 1e-9)

    def _draw(self) -> None:
        # Imported late: matplotlib is slow to load and only this rank needs it.
        from mlomae.preview import draw_preview

        loaders, config = self.loaders, self.config
        images = loaders.sample_images("heldout", NUM_PREVIEW_IMAGES).to(self.world.device)
        mean, std = (
            torch.tensor(channels, device=images.device)[:, None, None]
            for channels in (loaders.mean, loaders.std)
        )
        title = f"{config.masking.policy} mask, iteration {self.iteration}"
        with eagerly():
            draw_preview(self.run_dir.picture, self.levels.pretrain, images, mean, std, title)

    def save(self) -> None:
        """Writes a checkpoint and the encoder; called on every rank, written by rank 0."""
        levels = self.levels.by_name()
        states = {name: level.engine.state_dict() for name, level in levels.items()}
        tensors = {f"{name}.{key}": t for name, state in states.items() for key, t in state.items()}
        state = {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "precision": self.precision,
            "streams": {name: level.stream.state_dict() for name, level in levels.items()},
        }
        if self.levels.mask is not None:
            state["hypergradient"] = self.levels.mask.hypergradient.state_dict()

        def write() -> None:
            folder, keep = self.run_dir.checkpoints, self.config.keep_checkpoints
            checkpoint.save(folder, self.iteration, tensors, state, keep)
            self.run_dir.write_encoder(encoder_weights(states["pretrain"]))

        collectives.on_primary(write)

    def resume(self) -> str | None:
        """Continues from the newest intact checkpoint of the run directory, if there is one.

        Returns:
            The precision in which it was trained; None where there is none, or where it does not tell.
        """
        loaded = checkpoint.latest(self.run_dir.checkpoints)
        step = None if loaded is None else loaded.step
        if step != (agreed := collectives.broadcast_object(step)):
            raise UserError(
                f"run_dir {self.run_dir.path}: rank {self.world.rank} finds checkpoint {step}, rank 0 finds "
                f"{agreed}; all ranks need the same file system"
            )
        if loaded is None:
            return None
        levels = self.levels.by_name()
        checkpoint.match(loaded, self._expected_shapes())
        for name, level in levels.items():
            prefix = f"{name}."
            level.engine.load_state_dict(
                {key.removeprefix(prefix): t for key, t in loaded.tensors.items() if key.startswith(prefix)}
            )
            level.stream.load_state_dict(loaded.state["streams"][name])
        if self.levels.mask is not None and "hypergradient" in loaded.state:
            self.levels.mask.hypergradient.load_state_dict(loaded.state["hypergradient"])
        self.iteration = loaded.state["iteration"]
        self.seconds = loaded.state["seconds"]
        return loaded.state.get("precision")

    def _expected_shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            f"{name}.{key}": shape
            for name, level in self.levels.by_name().items()
            for key, shape in state_shapes(level.engine.module).items()
        }

    def evaluate(self) -> dict[str, Any]:
        """Scores the encoder on the test set and writes ``result.json``; called on every rank."""
        encoder, pool = self.levels.pretrain.autoencoder.encoder, self.config.model.pool

        def encode(images: Tensor) -> Tensor:
            with eagerly():
                return encoder(images, pool=pool)

        result: dict[str, Any] = {
            "policy": self.config.masking.policy,
            "seed": self.config.seed,
            "iterations": self.iteration,
            "seconds": round(self.seconds, 3),
            "images_per_second": round(self.images_per_second, 2),
        }
        if self.loaders.num_classes is not None:
            encoders = {"": encode} | ({"pixel_": pixels} if self.config.eval.pixels else {})
            result |= evaluate_features(encoders, self.loaders, self.config, self.world)
        self.bad_samples.exchange()
        result["bad_samples"] = len(self.loaders.ledger)
        if not self.world.primary:
            return {}
        self.run_dir.write_result(result)
        return result


def encoder_weights(pretrain_state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's timm state dict out of the pretrain engine's."""
    prefix = "encoder."
    weights = weights_of(pretrain_state)
    return {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
