"""The trainer: the order of events of a run. It knows no formula and no engine."""

from __future__ import annotations

import gc
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlomae import checkpoint
from mlomae.bad_samples import BadSamples
from mlomae.build import build_levels, describe_implementations
from mlomae.checkpoint import BackgroundWriter
from mlomae.checkpoint_folder import Score
from mlomae.compilation import eagerly, resolve_execution
from mlomae.config import Config
from mlomae.data.batches import Batch
from mlomae.data.loader import LevelLoaders
from mlomae.distributed import collectives
from mlomae.distributed.agreement import Agreement
from mlomae.distributed.ds_config import zero_stage
from mlomae.distributed.env import World
from mlomae.environment import describe_environment
from mlomae.errors import NotFinite, Preempted, UserError
from mlomae.evaluate import collect_features, pixels, score_features
from mlomae.guards import FiniteGuard, SpikeAlarm
from mlomae.hypergradient import MaskedBatch, Metrics
from mlomae.level_state import restore, snapshot
from mlomae.levels import ReadingLevel, mean_of
from mlomae.logbook import SHOWN, Logbook
from mlomae.meters import Meters, Peaks, Scalars
from mlomae.metrics import MetricsWriter
from mlomae.models.mae import MaskedAutoencoder
from mlomae.pictures import Pictures
from mlomae.precision import resolve_precision
from mlomae.preemption import Preemption
from mlomae.progress import say
from mlomae.ranges import position, profiled
from mlomae.report.lines import read_lines
from mlomae.run_dir import RunDir, to_json, write_atomically
from mlomae.score_pixels import score_pixels
from mlomae.telemetry import Telemetry, run_telemetry


class Trainer:
    """One run: K pretrain steps → head step → mask step per outer iteration, then evaluation."""

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        world: World,
        ds_config: dict[str, Any] | None,
        preemption: Preemption | None = None,
    ) -> None:
        self.config = config
        self.run_dir = run_dir
        self.world = world
        self.loaders = LevelLoaders(config, world.rank, world.size, world.device)
        self.precision = resolve_precision(config.compute.precision, world.device, ds_config)
        sharded = zero_stage(ds_config) == 3
        execution = resolve_execution(config.compute.execution, world.device, sharded)
        self.levels = build_levels(config, self.loaders, world, ds_config, self.precision, execution)
        self.implementations = describe_implementations(config, world, self.precision, execution)
        self.telemetry: Telemetry | None = None
        self.bad_samples = BadSamples(self.loaders.ledger, run_dir.bad_samples)
        self.preemption = preemption or Preemption()
        self.writer = BackgroundWriter(run_dir.checkpoints, config.keep_checkpoints)
        self.meters, self.peaks = Meters(), Peaks()
        # What tells the best checkpoint, since the last one.
        self.scored, self.score_meter = ("loss/mask" if self.levels.mask else "loss/reconstruction"), Meters()
        self.guard = FiniteGuard(config.failure.skips)
        self.rewinds = self.skipped_before = 0
        self.pictures: Pictures | None = None
        self.iteration = 0
        self.saved: int | None = None
        self.seconds = 0.0

    def fit(self) -> dict[str, Any]:
        """Trains from the last checkpoint, if there is one, to the end and evaluates.

        Returns:
            The content of ``result.json`` (on rank 0; empty elsewhere).

        Raises:
            NotFinite: a level broke, more often than the run may go back; the last checkpoint is kept.
            Preempted: a signal asked to stop; what was trained is saved.
        """
        trained = self.resume() or self.precision
        if trained != self.precision:
            raise UserError(
                f"compute.precision: the checkpoint was trained in {trained}, this run would use "
                f"{self.precision}; set compute.precision to {trained}"
            )
        if self.world.primary:
            environment = describe_environment(self.world.device) | {
                "world_size": self.world.size,
                "precision": self.precision,
                "implementations": self.implementations,
            }
            write_atomically(self.run_dir.environment, to_json(environment, indent=2).encode())
            say(self.config.display, f"{self.implementations}\n{self.loaders.describe()}")
        self.bad_samples.restore()
        while True:
            try:
                return self._attempt()
            except NotFinite as error:
                self._rewind(error)

    def _attempt(self) -> dict[str, Any]:
        """Trains from here to the end and evaluates."""
        config, primary = self.config, self.world.primary
        writer = MetricsWriter(self.run_dir, config, primary, config.iterations, self.iteration, SHOWN)
        # The others write no lines, and might read the file while it changes.
        alarm = SpikeAlarm(line for _, line in (read_lines(self.run_dir.metrics) if primary else ()))
        logbook = Logbook(writer, self.guard, alarm, config.display)
        with ExitStack() as at_end:
            for close in (self.loaders.close, writer.close, self.writer.close, gc.unfreeze):
                at_end.callback(close)
            try:
                self.telemetry = self.telemetry or self.start_telemetry()
                # What lives now lives to the end: no collection has to look at it again.
                gc.collect()
                gc.freeze()
                with self.preemption.deferred():
                    self._train(writer, logbook)
                result = self.evaluate()
                writer.result(result)
                return result
            except (KeyboardInterrupt, UserError, Preempted):
                logbook.write_waiting()
                self.bad_samples.write_own()
                raise

    def _rewind(self, error: NotFinite) -> None:
        """Back to the last checkpoint, but on with the next data: the same would break the run again."""
        rewinds, allowed = self.rewinds + 1, self.config.failure.rewinds
        positions = {name: stream.state_dict() for name, stream in self.levels.streams().items()}
        if self.saved is None or rewinds > allowed or self.resume() is None:
            raise error
        for name, stream in self.levels.streams().items():
            stream.load_state_dict(positions[name])
        self.rewinds, self.pictures = rewinds, None
        self.guard.forget()
        if self.world.primary:
            cause = str(error).partition(";")[0]
            say(self.config.display, f"{cause}; back to iteration {self.iteration} ({rewinds} of {allowed})")

    def _train(self, writer: MetricsWriter, logbook: Logbook) -> None:
        """All iterations that are left; ends with everything saved."""
        agreement = Agreement(max(self.config.failure.lost_after, self.config.failure.stuck_after))
        while self.iteration < self.config.iterations:
            started = time.perf_counter()
            masked = self.iterate(self.iteration)
            self.iteration += 1
            self._finish_iteration(masked, writer, logbook, started)
            # On all ranks after the same iteration, whoever received the signal and when.
            if agreement.anywhere(self.preemption.requested):
                if self.saved != self.iteration and self._settle(logbook):
                    self.save(scheduled=False)
                collectives.on_primary(self.writer.finish)
                raise self.preemption.stopped(f"iteration {self.saved}" if self.saved else None)
        collectives.on_primary(self.writer.finish)

    def _settle(self, logbook: Logbook, at_end: bool = False) -> bool:
        """Before anything is written; whether it may be: a broken checkpoint must not replace a good one."""
        logbook.flush()
        good = self.guard.check(at_end)
        self.bad_samples.exchange()
        return good

    def start_telemetry(self) -> Telemetry:
        """Measures what the device can do; figures count from here."""
        mask = self.levels.mask
        estimator = None if mask is None else mask.hypergradient.estimator
        return run_telemetry(self.config, self.world, self.precision, self.loaders.num_classes, estimator)

    def _next_batch(self, level: ReadingLevel[Any]) -> Batch:
        waiting = nullcontext() if self.telemetry is None else self.telemetry.waiting()
        with waiting, profiled("data"):
            return level.next_batch()

    def iterate(self, iteration: int) -> MaskedBatch:
        """One outer iteration; returns the last pretrain batch with its mask."""
        position.begin(iteration)
        levels, unroll_steps = self.levels, self.config.pretrain.unroll_steps
        due = levels.mask is not None and levels.mask.hypergradient.due(iteration)
        steps: list[Metrics] = []
        for number in range(unroll_steps):
            batch = self._next_batch(levels.pretrain)
            record = due and number == unroll_steps - 1
            masked, metrics = levels.pretrain.step(batch, iteration, record)
            self.peaks.add({"peak_loss/pretrain": metrics["loss/pretrain"]})
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
        if levels.hardness is not None:
            scalars |= levels.hardness.step(masked, iteration)
        for name, level in levels.by_name().items():
            if (loss := scalars.get(f"loss/{name}")) is not None:
                engine = level.engine
                self.guard.watch(name, iteration, loss, engine.weight_norm(), engine.skipped_steps)
                if name != "mask":  # which logs the norm of its hypergradient
                    scalars[f"gradient_norm/{name}"] = torch.as_tensor(engine.grad_norm, device=loss.device)
                if name != "pretrain":
                    self.peaks.add({f"peak_loss/{name}": loss})
        self.meters.add(scalars)
        if self.scored in scalars:
            self.score_meter.add({self.scored: scalars[self.scored]})
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
        good = True
        if due["checkpoint"] or due["picture"]:
            good = self._settle(logbook, last)
        # With the waits for the device, without saving and drawing.
        spent = time.perf_counter() - started
        self.seconds += spent
        self.telemetry.waited_for_device(spent - submitted)
        if due["checkpoint"] and good:
            with profiled("save"):
                self.save()
        if due["picture"]:
            with profiled("picture"):
                self._draw()
            writer.image(done, self.run_dir.picture)

    def _log(self, masked: MaskedBatch, logbook: Logbook) -> None:
        frequency, statistics = self.levels.pretrain.statistics(masked)
        figures: dict[str, float] = {
            f"lr/{name}": level.lr(self.iteration - 1) for name, level in self.levels.by_name().items()
        }
        figures |= {"bad_samples": len(self.loaders.ledger), "rewinds": self.rewinds}
        skipped = self.skipped_before + self.levels.skipped_steps
        statistics["skipped_steps"] = torch.as_tensor(skipped, device=self.world.device)
        if self.telemetry is not None:
            figures |= self.telemetry.read()
        scalars = {**self.meters.take(), **self.peaks.take(), **statistics}
        logbook.begin(self.iteration, scalars, frequency, figures)

    @property
    def images_per_second(self) -> float:
        """Pretrain images per second of training time, evaluation and pictures left out."""
        images = self.iteration * self.config.pretrain.unroll_steps * self.config.pretrain.batch_size
        return images / max(self.seconds, 1e-9)

    def _draw(self) -> None:
        """Draws the mask on rank 0; called on every rank, for the weights that it lacks."""
        autoencoder, mask, scorer = self._whole_autoencoder(), self.levels.mask, self.levels.scorer
        network = None if scorer is None else scorer.engine.whole_module()
        if not self.world.primary:
            return
        policy = self.levels.pretrain.policy
        if self.pictures is None:
            self.pictures = Pictures(self.run_dir, self.iteration, policy, self.loaders, self.world.device)
        influence = None if mask is None else mask.influence
        with eagerly():
            self.pictures.take(self.iteration, autoencoder, network, influence)

    def _whole_autoencoder(self) -> MaskedAutoencoder:
        module = self.levels.pretrain.engine.whole_module()
        assert isinstance(module, MaskedAutoencoder)
        return module

    def save(self, scheduled: bool = True) -> None:
        """Takes a checkpoint, which rank 0 writes while the training goes on; called on every rank.

        Args:
            scheduled: one out of schedule gets no score: of a few iterations it would be noise.
        """
        tensors = snapshot(self.levels)
        state = {
            "iteration": self.iteration,
            "seconds": self.seconds,
            "precision": self.precision,
            "streams": {name: stream.state_dict() for name, stream in self.levels.streams().items()},
            "meters": self.meters.state_dict(),
            "peaks": self.peaks.state_dict(),
            "rewinds": self.rewinds,
            "skipped_steps": self.skipped_before + int(self.levels.skipped_steps),
        }
        if self.levels.mask is not None:
            state["hypergradient"] = self.levels.mask.hypergradient.state_dict()
        scalars = self.score_meter.take() if scheduled else {}
        state["score"] = self.score_meter.state_dict()
        score = Score(self.scored, Scalars(scalars).read()[self.scored]) if scalars else None
        collectives.on_primary(lambda: self.writer.submit(self.iteration, tensors, state, score))
        self.saved = self.iteration

    def resume(self, path: Path | None = None) -> str | None:
        """Continues from a checkpoint: the newest intact one of the run directory, if there is one.

        Args:
            path: another one, on every rank.

        Returns:
            The precision in which it was trained; None where there is none, or where it does not tell.
        """
        position.part = "load"
        found: list[Path] = [] if path is None else [path]
        if path is None:
            collectives.on_primary(lambda: found.extend(checkpoint.usable(self.run_dir.checkpoints)))
        path = next(iter(collectives.broadcast_object(found)), None)
        if path is None:
            return None
        if not path.is_dir():
            raise UserError(
                f"run_dir {self.run_dir.path}: rank {self.world.rank} does not find {path.name}, "
                "which rank 0 finds; all ranks need the same file system"
            )
        loaded = checkpoint.read(path)
        restore(self.levels, loaded)
        for name, stream in self.levels.streams().items():
            stream.load_state_dict(loaded.state["streams"][name])
        if self.levels.mask is not None:
            self.levels.mask.hypergradient.load_state_dict(loaded.state["hypergradient"])
        self.meters.load_state_dict(loaded.state["meters"], self.world.device)
        self.peaks.load_state_dict(loaded.state["peaks"], self.world.device)
        self.rewinds = loaded.state["rewinds"]
        skipped = int(self.levels.skipped_steps)
        self.skipped_before = (
            max(loaded.state.get("skipped_steps", 0), self.skipped_before + skipped) - skipped
        )
        self.score_meter.load_state_dict(loaded.state["score"], self.world.device)
        self.iteration = self.saved = loaded.state["iteration"]
        self.seconds = loaded.state["seconds"]
        return loaded.state["precision"]

    def evaluate(self) -> dict[str, Any]:
        """Scores the encoder on the test set and writes ``result.json``; called on every rank."""
        encoder, pool = self._whole_autoencoder().encoder, self.config.model.pool

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
        features = {}
        if self.loaders.has_label_maps:
            result |= score_pixels(encoder, self.levels.head, self.loaders, self.world)
        elif self.loaders.num_classes is not None:
            encoders = {"": encode} | ({"pixel_": pixels} if self.config.eval.pixels else {})
            with profiled("evaluate/features"):
                features = {p: collect_features(of, self.loaders, self.world) for p, of in encoders.items()}
        self.bad_samples.exchange()
        # From here on rank 0 is on its own: others would wait for it in vain.
        if not self.world.primary:
            return {}
        for prefix, parts in features.items():
            result |= score_features(parts, prefix, self.config.eval.knn_k, self.world.device)
        result["bad_samples"] = len(self.loaders.ledger)
        try:
            self.run_dir.write_result(result)
        except OSError as error:
            raise UserError(f"{self.run_dir.result}: cannot be written ({error.strerror})") from None
        return result
