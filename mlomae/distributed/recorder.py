"""What the mask level has to know about an optimizer step: where it started, and its slope."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlomae.mlo.adamw import adamw_slope, before_adamw


@dataclass(frozen=True)
class StepRecord:
    """One step of the pretrain level, as vectors of its weight space.

    Attributes:
        point: computes the weights before the step, to rounding; only until the next step.
        slope: derivative of the AdamW step in its gradient, None unless it was asked for.
    """

    point: Callable[[], list[Tensor]]
    slope: list[Tensor] | None


class StepCounter:
    """Counts the steps of every parameter on the host: a fused optimizer's own count lies on the device.

    Steps that a fused optimizer skips by itself are counted until the next ``restart``: only the device knows
    of them, and the bias corrections that the count is for forget one step more or less soon.

    Args:
        optimizer: its steps are counted, also when DeepSpeed takes them, one group at a time.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._before = 0
        self._since: Counter[int] = Counter()
        optimizer.register_step_post_hook(self._after)

    def restart(self, steps: int) -> None:
        """Goes on from a loaded optimizer state."""
        self._before = steps
        self._since.clear()

    def number(self, parameter: Tensor) -> int:
        """Steps that the parameter has taken."""
        return self._before + self._since[id(parameter)]

    def _after(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._since.update(
            id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None
        )


class StepRecorder:
    """Watches the steps of an AdamW optimizer while it is entered.

    Args:
        optimizer: its steps are watched, also when DeepSpeed takes them, one group at a time.
        counter: of the same optimizer.
        targets: the parameters to record, in the order of the record.
        slope: whether to record the slope too.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, counter: StepCounter, targets: list[Tensor], slope: bool
    ) -> None:
        self._optimizer = optimizer
        self._counter = counter
        self._targets = targets
        self._wanted = {id(target) for target in targets}
        self._with_slope = slope
        self._settings: dict[int, dict[str, Any]] = {}
        self._slopes: dict[int, Tensor] = {}
        self._hook: Any = None

    def __enter__(self) -> StepRecorder:
        self._hook = self._optimizer.register_step_post_hook(self._after)
        return self

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def record(self, grad_norm: Tensor | float | None, clip: float) -> StepRecord:
        """The record; a parameter that took no step was where it is, and has slope 0.

        Args:
            grad_norm: of the step's gradient before clipping.
            clip: limit of the gradient norm, 0 without clipping. The factor by which clipping shortened the
                gradient counts as constant.
        """
        if not self._with_slope:
            return StepRecord(self._point, None)
        slope = [self._slopes[id(t)] if id(t) in self._slopes else torch.zeros_like(t) for t in self._targets]
        if clip and grad_norm is not None:
            factor = (clip / (torch.as_tensor(grad_norm) + 1e-6)).clamp(max=1.0)
            # Offloaded slopes lie in host memory.
            torch._foreach_mul_(slope, factor.to(slope[0].device))
        return StepRecord(self._point, slope)

    def _point(self) -> list[Tensor]:
        return [
            before_adamw(target.detach(), **self._settings[id(target)])
            if id(target) in self._settings
            else target.detach().clone()
            for target in self._targets
        ]

    def _after(self, *_: object) -> None:
        for group in self._optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) not in self._wanted or parameter.grad is None:
                    continue
                moments = self._optimizer.state[parameter]
                settings = {
                    "exp_avg": moments["exp_avg"],
                    "exp_avg_sq": moments["exp_avg_sq"],
                    "step": self._counter.number(parameter),
                    "betas": group["betas"],
                    "eps": group["eps"],
                }
                if self._with_slope:
                    self._slopes[id(parameter)] = adamw_slope(parameter.grad, **settings)
                rates = {"lr": group["lr"], "weight_decay": group["weight_decay"]}
                self._settings[id(parameter)] = {**settings, **rates}
