"""``mlomae hypergrad-check``: every estimator against the exact hypergradient, on a real batch of a run."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from mlomae import objectives
from mlomae.config import Config
from mlomae.distributed.engine import TorchEngine, trainable
from mlomae.distributed.env import join_world
from mlomae.distributed.recorder import StepRecord
from mlomae.errors import UserError
from mlomae.hypergradient import Hypergradient, MaskedBatch
from mlomae.levels import HeadLevel
from mlomae.memory import peak_bytes
from mlomae.mlo.direction import Direction
from mlomae.mlo.estimators import ESTIMATORS, TRUNCATION_ORDER
from mlomae.run_dir import RunDir
from mlomae.trainer import Trainer

REPEATS = 5
RADII = [10.0 ** (-exponent / 2) for exponent in range(12, 1, -1)]


@dataclass(frozen=True)
class Estimate:
    """One estimator on one batch.

    Attributes:
        estimator: its name.
        cosine, relative_error: of the hypergradient to the exact one, which is computed in float64
            throughout; direction and masking network included.
        seconds: of the influence, median.
        peak_bytes: memory of the influence beyond what was allocated before.
    """

    estimator: str
    cosine: float
    relative_error: float
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Check:
    """What the command shows.

    Attributes:
        estimates: one per estimator.
        chosen: name of the run's own estimator.
        radii: radius that each finite difference chose for itself, by name.
        curves: by name, (radius, relative error) of fixed radii.
        direction_seconds: of v, which all estimators share.
        images: in the batch.
        iteration: of the checkpoint.
        precision: of the passes.
    """

    estimates: list[Estimate]
    chosen: str
    radii: dict[str, float]
    curves: dict[str, list[tuple[float, float]]]
    direction_seconds: float
    images: int
    iteration: int
    precision: str


def check(config: Config, run_dir: RunDir, images: int | None, bf16: bool) -> Check:
    """Measures every estimator at the last checkpoint of a run, or at the beginning of a new one.

    Trains one outer iteration's pretrain steps in memory; nothing is written.

    Args:
        images: in each of the three batches; None for what the exact gradient can carry, at most 32.
        bf16: run the passes under bf16 autocast, whatever the recipe says.

    Raises:
        UserError: the policy has no hypergradient, or the batch exceeds its set.
    """
    if not config.masking.learns:
        policy = config.masking.policy
        raise UserError(f"masking.policy: {policy} has no hypergradient; use learned or weighted-random")
    batches = {level: getattr(config, level).batch_size for level in ("pretrain", "head", "mask")}
    changed = {
        level: getattr(config, level).model_copy(update={"batch_size": min(images or 32, size)})
        for level, size in batches.items()
    }
    changed["pretrain"] = changed["pretrain"].model_copy(update={"micro_batches": 1})
    hypergradient = config.hypergradient.model_copy(update={"share": 1.0})
    # The exact gradient works on copies of the modules, of which the compiler knows nothing.
    compute = config.compute.model_copy(
        update={"execution": "eager", **({"precision": "bf16"} if bf16 else {})}
    )
    config = config.model_copy(update={**changed, "hypergradient": hypergradient, "compute": compute})
    trainer = Trainer(config, run_dir, join_world(config.device), None)
    try:
        trainer.resume()
        return _Measured(trainer).check()
    finally:
        trainer.loaders.close()


class _Measured:
    """A trainer after its next pretrain steps, with the batches at which the gradient is taken."""

    def __init__(self, trainer: Trainer) -> None:
        levels = trainer.levels
        assert levels.mask is not None and levels.head is not None
        self.config, self.device, self.iteration = trainer.config, trainer.world.device, trainer.iteration
        self.pretrain, self.head, self.mask = levels.pretrain, levels.head, levels.mask
        assert isinstance(self.pretrain.engine, TorchEngine)
        self.bf16, self.precision = self.pretrain.engine.mixed, trainer.precision
        for _ in range(self.config.pretrain.unroll_steps - 1):
            self._step(record=False)
        self.masked = self._step(record=True)
        self.train, self.heldout = self.head.next_batch(), self.mask.next_batch()

    def check(self) -> Check:
        own = Hypergradient(self.config, self.pretrain.engine, self.head.problem)
        # The first call also compiles, or loads kernels.
        own.direction(self.train, self.heldout, self.iteration)
        started = self._now()
        direction = own.direction(self.train, self.heldout, self.iteration)
        direction_seconds = self._now() - started
        exact = self._exact()
        estimates, radii, curves = [], {}, {}
        for name in ESTIMATORS:
            hypergradient = self._configured(estimator=name)
            estimates.append(self._measure(name, hypergradient, direction, exact))
            if name in TRUNCATION_ORDER:
                radii[name] = hypergradient.radius.value
                curves[name] = [(radius, self._error_at(name, radius, direction, exact)) for radius in RADII]
        precision = "bf16 autocast" if self.bf16 else self.precision
        images = len(self.masked.images)
        return Check(
            estimates, own.estimator, radii, curves, direction_seconds, images, self.iteration, precision
        )

    def _step(self, record: bool) -> MaskedBatch:
        batch = self.pretrain.next_batch()
        return self.pretrain.step(batch, self.iteration, record)[0]

    def _config(self, **changes: Any) -> Config:
        section = self.config.hypergradient.model_copy(update={"precision": "auto", **changes})
        return self.config.model_copy(update={"hypergradient": section})

    def _configured(self, **changes: Any) -> Hypergradient:
        return Hypergradient(self._config(**changes), self.pretrain.engine, self.head.problem)

    def _error_at(self, name: str, radius: float, direction: Direction, exact: Tensor) -> float:
        fixed = self._configured(estimator=name, radius=radius, check_every=0)
        return _relative_error(self._gradient(fixed, direction), exact)

    def _measure(
        self, name: str, hypergradient: Hypergradient, direction: Direction, exact: Tensor
    ) -> Estimate:
        # The first one also finds the radius.
        gradient = self._gradient(hypergradient, direction)

        def run() -> Tensor:
            return hypergradient.influence(self.masked, direction)[0]

        seconds = []
        for _ in range(REPEATS):
            started = self._now()
            run()
            seconds.append(self._now() - started)
        cosine = float(cosine_similarity(gradient.double(), exact, dim=0))
        error = _relative_error(gradient, exact)
        peak = peak_bytes(run, self.device)
        return Estimate(name, cosine, error, statistics.median(seconds), peak)

    def _now(self) -> float:
        """Seconds, once the device has done all that it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _gradient(self, hypergradient: Hypergradient, direction: Direction) -> Tensor:
        influence = hypergradient.influence(self.masked, direction)[0]
        return mask_gradient(self.mask.engine.module, self.masked, influence)

    def _exact(self) -> Tensor:
        """Everything in float64: the direction, the double backward and the masking network."""
        config = self._config(estimator="exact")
        autoencoder, classifier, network = (
            copy.deepcopy(level.engine.module).double() for level in (self.pretrain, self.head, self.mask)
        )
        head = HeadLevel(TorchEngine(classifier, config.head), self.head.stream, config)
        hypergradient = Hypergradient(config, TorchEngine(autoencoder, config.pretrain), head.problem)
        masked = _double(self.masked)
        train, heldout = (replace(b, images=b.images.double()) for b in (self.train, self.heldout))
        direction = hypergradient.direction(train, heldout, self.iteration)
        return mask_gradient(network, masked, hypergradient.influence(masked, direction)[0])


def mask_gradient(network: nn.Module, masked: MaskedBatch, influence: Tensor) -> Tensor:
    """The hypergradient as one vector, divided by the learning rate of the pretrain level."""
    probability = network(masked.tokens).sigmoid()
    loss = objectives.mask_loss(probability, masked.selection.mask, influence, 1.0)
    weights = [parameter for _, parameter in trainable(network)]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])


def _double(masked: MaskedBatch) -> MaskedBatch:
    assert masked.tokens is not None and masked.step is not None
    slope = masked.step.slope
    point = _wide(masked.step.point())
    step = StepRecord(lambda: point, None if slope is None else _wide(slope))
    return replace(
        masked, images=masked.images.double(), tokens=masked.tokens.double(), errors=None, step=step
    )


def _wide(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def _relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def rows(result: Check) -> list[dict[str, Any]]:
    """The estimates as plain values, for ``--json``."""
    return [asdict(estimate) for estimate in result.estimates]
