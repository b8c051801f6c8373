"""The hypergradient of a run: the configured direction and influence around the pretrain and head levels.

    d L_val / d phi = -lr * sum_bi (m_bi / M) * (D_v l_bi) * d p_bi / d phi

v is taken at the weights after the last pretrain step, the influence D_v l at those before it: that is
the derivative of L_val(theta - lr * u(grad L_pre(theta, phi))), see docs/hypergradient.md (Guo et al. 2025).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from mlomae.compilation import eagerly
from mlomae.config import Config
from mlomae.data.batches import Batch
from mlomae.distributed import collectives
from mlomae.distributed.engine import Engine
from mlomae.distributed.recorder import StepRecord
from mlomae.errors import UserError
from mlomae.mlo.best_response import HeadProblem
from mlomae.mlo.direction import Direction, encoder_direction
from mlomae.mlo.estimators import ESTIMATORS, TRUNCATION_ORDER
from mlomae.mlo.influence import PatchErrors, unit_step
from mlomae.mlo.radius import Radius
from mlomae.models.attention import using_attention
from mlomae.models.mae import MaskedAutoencoder
from mlomae.models.selection import PatchSelection
from mlomae.precision import ieee_float32

Metrics = dict[str, Tensor]
"""Scalars by name, 0-dim tensors on the device."""

# Where an automatic radius starts: below the best one in every precision (``mlomae.mlo.radius``), and in
# float32 good enough for a run that never checks.
START_RADIUS = {"fd": 1e-4, "fd-forward": 1e-5}
COARSE_START_RADIUS = 1e-5
NUM_SHOWN = 8  # images in pictures


@dataclass(frozen=True)
class MaskedBatch:
    """One pretrain batch and its mask: at which the mask level differentiates the pretrain step.

    Attributes:
        images: [B, C, H, W].
        selection: the patches kept.
        tokens: [B, L, D] input of the masking network, frozen; None without one.
        scores: [B, L] of the masking network, constant; None without one.
        errors: [B, L] of the pretrain step, constant; None before it.
        step: that step; None unless the mask level differentiates it.
        labels: int64 [B]; None where the pretrain step does not classify.
    """

    images: Tensor
    selection: PatchSelection
    tokens: Tensor | None
    scores: Tensor | None
    errors: Tensor | None = None
    step: StepRecord | None = None
    labels: Tensor | None = None

    def first(self, share: float) -> MaskedBatch:
        """The first images, rounded up; batches are shuffled, so that they are a fair sample."""
        return self.rows(0, math.ceil(share * len(self.images)))

    def split(self, parts: int) -> list[MaskedBatch]:
        """Equal parts, in order; ``parts`` divides the number of images."""
        size = len(self.images) // parts
        return [self.rows(start, start + size) for start in range(0, len(self.images), size)]

    def rows(self, start: int, stop: int) -> MaskedBatch:
        """Some of the images."""
        if (start, stop) == (0, len(self.images)):
            return self

        def cut(x: Tensor | None) -> Tensor | None:
            return None if x is None else x[start:stop]

        selection = self.selection
        return replace(
            self,
            images=self.images[start:stop],
            selection=PatchSelection(
                selection.ids_keep[start:stop], selection.ids_restore[start:stop], selection.mask[start:stop]
            ),
            tokens=cut(self.tokens),
            scores=cut(self.scores),
            errors=cut(self.errors),
            labels=cut(self.labels),
        )


@dataclass(frozen=True)
class InfluenceSample:
    """Some images of one hypergradient, for pictures.

    Attributes:
        iteration: outer iteration that took it.
        images: [M, C, H, W], normalised.
        mask: [M, L], 1 where removed.
        influence: [M, L], of use where removed; positive where weighing a patch more would help the task.
    """

    iteration: int
    images: Tensor
    mask: Tensor
    influence: Tensor

    @classmethod
    def of(cls, iteration: int, masked: MaskedBatch, influence: Tensor) -> InfluenceSample:
        """Copies of the first images: the batch itself does not outlive the iteration."""
        rows = masked.images, masked.selection.mask, influence
        return cls(iteration, *(tensor[:NUM_SHOWN].detach().clone() for tensor in rows))


class Hypergradient:
    """Computes v and the influence; holds the radius, the only state.

    Args:
        config: of the run.
        engine: of the pretrain level.
        head: the head level as a problem, at an outer iteration.

    Raises:
        UserError: the estimator cannot work with this engine.
    """

    def __init__(self, config: Config, engine: Engine, head: Callable[[int], HeadProblem]) -> None:
        self.config = config.hypergradient
        self.engine = engine
        # A head for pixels reads the patches themselves.
        self.pool = "patches" if config.data.has_label_maps else config.model.pool
        self.space = engine.weight_space("encoder.")
        self._head = head
        with engine.autocast():
            self.autocast = torch.is_autocast_enabled(self._device_type)
        self.estimator, self.full_precision = self._choose()
        self.radius = self._start_radius()
        self.taken = 0

    @property
    def autoencoder(self) -> MaskedAutoencoder:
        assert isinstance(self.engine.module, MaskedAutoencoder)
        return self.engine.module

    @property
    def _device_type(self) -> str:
        return next(self.engine.module.parameters()).device.type

    def due(self, iteration: int) -> bool:
        """Whether this outer iteration takes a hypergradient."""
        return iteration % self.config.every == 0

    def features(self, images: Tensor) -> Tensor:
        """What the head reads of whole images, differentiable, in the engine's precision.

        Returns:
            [B, F] pooled features; patch tokens [B, L, D] where labels are maps.
        """
        with self.engine.autocast():
            features = self.autoencoder.encoder(images, pool=self.pool)
        # The head's own derivatives are taken outside autocast: they are exact and cost nothing.
        return features.to(images.dtype)

    def direction(self, train: Batch, heldout: Batch, iteration: int) -> Direction:
        """v: how the held-out loss changes with the encoder's weights."""
        assert train.labels is not None and heldout.labels is not None
        return encoder_direction(
            self.features,
            self.space,
            self._head(iteration),
            (train.images, train.labels),
            (heldout.images, heldout.labels),
            collectives.average,
        )

    def influence(self, masked: MaskedBatch, direction: Direction) -> tuple[Tensor, Metrics]:
        """Derivative of each patch's error [B, L] along v, preconditioned where asked for."""
        v = direction.values
        if masked.step is not None and masked.step.slope is not None:
            v = [a * b for a, b in zip(v, masked.step.slope, strict=True)]
        errors, (unit, norm) = self._patch_errors(masked), unit_step(self.space, v)
        estimate = ESTIMATORS[self.estimator]
        checked = bool(self.config.check_every) and self.taken % self.config.check_every == 0
        self.taken += 1

        def at(radius: float) -> Tensor:
            return estimate(errors, v, radius * unit)

        metrics: Metrics = {}
        if self.estimator in TRUNCATION_ORDER and checked:
            values = self.radius.check(at, lambda difference: _size(difference, masked.selection.mask))
            if self.radius.error is not None:
                metrics["hypergradient/estimated_error"] = _scalar(self.radius.error, values)
        else:
            values = at(self.radius.value)
        if self.estimator in TRUNCATION_ORDER:
            metrics["hypergradient/radius"] = _scalar(self.radius.value, values)
        return values, {"hypergradient/direction_norm": norm, **metrics}

    def state_dict(self) -> dict[str, Any]:
        """The radius and how many hypergradients were taken."""
        return {"radius": self.radius.value, "taken": self.taken}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.radius.value, self.taken = state["radius"], state["taken"]

    def _choose(self) -> tuple[str, bool]:
        """The estimator, and whether it runs in full float32 whatever the engine's precision."""
        name = self.config.resolve_estimator(self.autocast, self.space.has_whole_vectors)
        precision: str = self.config.precision
        if precision == "auto":
            precision = "float32" if name in ("fd", "exact") else "engine"
        where = f"hypergradient.estimator: {name}"
        if name in ("jvp", "exact") and not self.space.has_whole_vectors:
            raise UserError(f"{where} needs whole weights on every rank, which ZeRO 3 does not keep; use fd")
        if name == "fd-forward" and precision == "float32" and self.autocast:
            raise UserError(
                f"{where} reuses the errors of the pretrain step, which runs under autocast; "
                "set hypergradient.precision to engine, or use fd"
            )
        return name, precision == "float32"

    def _start_radius(self) -> Radius:
        given, name = self.config.radius, self.estimator
        order = TRUNCATION_ORDER.get(name, 2)
        if not isinstance(given, str):
            return Radius(given, order, adaptive=False)
        coarse = self.autocast and not self.full_precision
        start = COARSE_START_RADIUS if coarse else START_RADIUS.get(name, 1e-4)
        return Radius(start, order, adaptive=True)

    def _patch_errors(self, masked: MaskedBatch) -> PatchErrors:
        autoencoder = self.autoencoder

        def evaluate() -> Tensor:
            with self._precision():
                return autoencoder(masked.images, masked.selection)

        def function(weights: Mapping[str, Tensor]) -> Tensor:
            # Fused attention has neither a forward mode nor a second derivative.
            with self._precision(), eagerly(), using_attention(autoencoder, "reference"):
                return functional_call(autoencoder, dict(weights), (masked.images, masked.selection))

        point = None if masked.step is None else masked.step.point()
        # The pretrain step's own errors are of use where they round alike: in its own precision, and where no
        # compiler fused its pass, which keeps activations, in another way than this one.
        compiled = autoencoder._compiled_call_impl is not None
        known = None if self.full_precision or compiled else masked.errors
        return PatchErrors(self.space, point, known, evaluate, function)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """A fresh context: autocast would reuse the weights that it cast in the last one."""
        if not self.full_precision:
            with self.engine.autocast():
                yield
            return
        # A caller's autocast, such as DeepSpeed's, must not reach in.
        off = torch.autocast(self._device_type, enabled=False) if self.autocast else nullcontext()
        with off, ieee_float32():
            yield


def _size(difference: Tensor, mask: Tensor) -> float:
    """Norm of an influence over all ranks as the masking network feels it.

    Its scores are centred, so that what all removed patches of an image share moves nothing.
    """
    removed = mask.to(difference.dtype)
    mean = (difference * removed).sum(1, keepdim=True) / removed.sum(1, keepdim=True)
    square = ((difference - mean) * removed).double().square().sum()
    (mean_square,) = collectives.average([square])
    return math.sqrt(float(mean_square))


def _scalar(value: float, like: Tensor) -> Tensor:
    return torch.full((), value, dtype=torch.float32, device=like.device)
