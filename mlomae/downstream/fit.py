"""The training loop of all evaluations that train: fine-tuning, segmentation, detection.

A batch is a pure function of its number and the noise of a step is seeded by its number, so that a resumed
evaluation takes the same steps.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mlomae.distributed import collectives
from mlomae.distributed.agreement import Agreement
from mlomae.distributed.engine import MOMENTS, load_moments
from mlomae.distributed.env import World
from mlomae.downstream.optimizer import build_optimizer, set_rates
from mlomae.downstream.sections import FAILURE, TrainedTaskConfig
from mlomae.errors import UserError
from mlomae.metrics import MetricsWriter
from mlomae.mlo.schedule import warmup_cosine
from mlomae.precision import resolve_precision, set_float32_products
from mlomae.preemption import Preemption
from mlomae.progress import Show
from mlomae.random import stream_seed
from mlomae.ranges import position
from mlomae.run_dir import RunDir
from mlomae.tensor_file import read_tensors, write_tensors


class Task(Protocol):
    """What an evaluation that trains consists of.

    Attributes:
        model: on the world's device; called with what a batch holds, in training mode it may be wrapped for
            several ranks.
        encoder_prefix: of the names of the ViT's parameters in the model.
        steps_per_epoch: batches in an epoch.
        digest: of the training images (``mlomae.downstream.reader.digest_of``).
        show: scalars for the screen, as for ``Progress``.
    """

    model: nn.Module
    encoder_prefix: str
    steps_per_epoch: int
    digest: str
    show: Show

    def batches(self, first: int) -> Iterator[Any]:
        """This rank's share of batch ``first`` and all that follow, without end, on the device."""

    def loss(self, model: nn.Module, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss to descend, 0-dim, and scalars to log, detached.

        Args:
            model: ``self.model``, or a wrapper around it through which the forward pass has to go.
        """

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Figures on the test set, by name; called on every rank, what counts is rank 0's answer.

        Args:
            model: like ``self.model``, in evaluation mode.
        """

    def draw(self, model: nn.Module, path: Path) -> None:
        """Writes a PNG of what the model makes of test images, where that can be drawn; on rank 0 alone."""

    def close(self) -> None:
        """Ends loader processes."""


class Fit:
    """Trains and scores one task.

    Args:
        run_dir: claimed; receives metrics.jsonl, checkpoint.safetensors, model.safetensors, predictions.png.
    """

    def __init__(
        self, task: Task, config: TrainedTaskConfig, run_dir: RunDir, world: World, preemption: Preemption
    ) -> None:
        self.task, self.config, self.run_dir, self.world = task, config, run_dir, world
        self.preemption = preemption
        self.total = config.optim.epochs * task.steps_per_epoch
        self.optimizer = build_optimizer(task.model, task.encoder_prefix, config.optim)
        self.parameters = dict(task.model.named_parameters())
        self.ema = ModelEmaV3(task.model, decay=config.optim.ema) if config.optim.ema else None
        self.model: nn.Module = task.model
        if world.size > 1:
            self.model = DistributedDataParallel(task.model)
        self.precision = resolve_precision(config.precision, world.device, None, "precision")
        set_float32_products(self.precision)
        self.done, self.seconds = 0, 0.0

    @property
    def checkpoint(self) -> Path:
        return self.run_dir.path / "checkpoint.safetensors"

    def run(self) -> dict[str, Any]:
        """Trains from where it stopped, if it did, and evaluates.

        Returns:
            Figures on the test set, and what they cost; on rank 0 they count.

        Raises:
            UserError: the loss stopped being finite, or a file cannot be written.
            Preempted: a signal asked to stop; what was trained is saved.
        """
        self._resume()
        task, world = self.task, self.world
        writer = MetricsWriter(self.run_dir, self.config, world.primary, self.total, self.done, task.show)
        with closing(writer):
            try:
                with self.preemption.deferred():
                    self._train(writer)
            finally:
                task.close()
            model = task.model if self.ema is None else self.ema.module
            model.eval()
            with torch.no_grad(), self._autocast():
                figures = task.evaluate(model)
            writer.result(figures)
        collectives.on_primary(lambda: self._leave(model))
        return {**figures, "epochs": self.config.optim.epochs, "seconds": round(self.seconds, 3)}

    def _train(self, writer: MetricsWriter) -> None:
        agreement = Agreement(FAILURE.stuck_after)
        self.task.model.train()
        batches = self.task.batches(self.done) if self.done < self.total else iter(())
        sums: dict[str, Tensor] = {}
        since, started = self.done, time.perf_counter()
        every = self.config.checkpoint_every * self.task.steps_per_epoch
        while self.done < self.total:
            position.begin(self.done)
            for name, value in self._step(next(batches)).items():
                sums[name] = sums[name] + value if name in sums else value
            self.done += 1
            stop = agreement.anywhere(self.preemption.requested)
            due = self.done % every == 0 or self.done == self.total or stop
            if due or self.done % self.config.log_every == 0:
                now = time.perf_counter()
                self.seconds, took, started = self.seconds + now - started, now - started, now
                self._log(writer, sums, self.done - since, took)
                sums, since = {}, self.done
            if due:
                self._save()
            if stop:
                raise self.preemption.stopped(f"step {self.done}")

    def _step(self, batch: Any) -> dict[str, Tensor]:
        config = self.config.optim
        _seed_all(stream_seed(self.config.seed, "fit", self.done, self.world.rank))
        with self._autocast():
            loss, scalars = self.task.loss(self.model, batch)
        loss.backward()
        if config.clip:
            nn.utils.clip_grad_norm_(self.parameters.values(), config.clip)
        set_rates(self.optimizer, self._lr(self.done))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update(self.task.model, step=self.done + 1)  # timm counts from 1
        return {"loss": loss.detach(), **scalars}

    def _lr(self, step: int) -> float:
        c = self.config.optim
        return warmup_cosine(step, self.total, c.lr, c.min_lr, c.warmup)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision != "bf16":
            return nullcontext()
        return torch.autocast(self.world.device.type, torch.bfloat16)

    def _log(self, writer: MetricsWriter, sums: dict[str, Tensor], steps: int, seconds: float) -> None:
        means = collectives.average([value.float() / steps for value in sums.values()])
        scalars = {name: float(mean) for name, mean in zip(sums, means, strict=True)}
        if not np.isfinite(scalars["loss"]):
            raise self._not_finite(f"the loss is {scalars['loss']}")
        scalars["lr"] = self._lr(self.done - 1)
        scalars["epoch"] = self.done / self.task.steps_per_epoch
        scalars["images_per_second"] = steps * self.config.optim.batch_size / max(seconds, 1e-9)
        writer.log(self.done, scalars)

    def _not_finite(self, what: str) -> UserError:
        return UserError(
            f"optim.lr: {what} in the steps up to {self.done}; lower the rate, or set optim.clip, with "
            f"another --out. The last checkpoint in {self.run_dir.path} is kept"
        )

    def _save(self) -> None:
        """Writes a checkpoint; called on every rank."""
        if not torch.stack([parameter.isfinite().all() for parameter in self.parameters.values()]).all():
            raise self._not_finite("the weights are no longer finite")

        def write() -> None:
            tensors = {f"model.{name}": value for name, value in self.task.model.state_dict().items()}
            if self.ema is not None:
                tensors |= {f"ema.{name}": value for name, value in self.ema.module.state_dict().items()}
            for name, parameter in self.parameters.items():
                moments = self.optimizer.state.get(parameter, {})
                tensors |= {f"{key}.{name}": moments[key] for key in MOMENTS if key in moments}
            state = {"step": self.done, "seconds": self.seconds, "data": self.task.digest}
            write_tensors(self.checkpoint, tensors, state)

        collectives.on_primary(write)

    def _resume(self) -> None:
        position.part = "load"
        saved = read_tensors(self.checkpoint)
        if saved is None:
            return
        tensors, state = saved
        if state["data"] != self.task.digest:
            raise UserError(
                f"data.path: holds other training images or classes than those of the unfinished evaluation "
                f"in {self.run_dir.path}; give the same ones, or another --out"
            )
        self.task.model.load_state_dict(_under(tensors, "model."))
        if self.ema is not None:
            self.ema.module.load_state_dict(_under(tensors, "ema."))
        # A parameter that never had a gradient has no moments.
        moved = {name: p for name, p in self.parameters.items() if f"{MOMENTS[0]}.{name}" in tensors}
        step = torch.tensor(float(state["step"]))
        load_moments(self.optimizer, moved, {**tensors, "step": step})
        self.done, self.seconds = state["step"], state["seconds"]

    def _leave(self, model: nn.Module) -> None:
        write_tensors(self.run_dir.path / "model.safetensors", model.state_dict())
        self.task.draw(model, self.run_dir.path / "predictions.png")


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _seed_all(seed: int) -> None:
    """Seeds all generators that layers and augmentations of libraries draw from."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
