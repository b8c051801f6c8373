"""What the mask level has to know about an optimizer step: where it started, and its slope."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mlomae.mlo.precondition import adamw_slope


@dataclass(frozen=True)
class StepRecord:
    """One step of the pretrain level, as vectors of its weight space.

    Attributes:
        point: the weights before the step.
        slope: derivative of the AdamW step in its gradient, None unless it was asked for.
    """

    point: list[Tensor]
    slope: list[Tensor] | None


class StepRecorder:
    """Watches the steps of an AdamW optimizer while it is entered.

    Args:
        optimizer: its steps are watched, also when DeepSpeed takes them, one group at a time.
        targets: the parameters to record, in the order of the record.
        slope: whether to record the slope too.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, targets: list[Tensor], slope: bool) -> None:
        self._optimizer = optimizer
        self._targets = targets
        self._wanted = {id(target) for target in targets}
        self._with_slope = slope
        self._points: dict[int, Tensor] = {}
        self._slopes: dict[int, Tensor] = {}
        self._hooks: list[Any] = []

    def __enter__(self) -> StepRecorder:
        self._hooks = [
            self._optimizer.register_step_pre_hook(self._before),
            self._optimizer.register_step_post_hook(self._after),
        ]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def record(self, grad_norm: Tensor | float | None, clip: float) -> StepRecord:
        """The record; a parameter that took no step stays where it is, and has slope 0.

        Args:
            grad_norm: of the step's gradient before clipping.
            clip: limit of the gradient norm, 0 without clipping. The factor by which clipping shortened the
                gradient counts as constant.
        """
        point = [self._points[id(t)] if id(t) in self._points else t.detach().clone() for t in self._targets]
        if not self._with_slope:
            return StepRecord(point, None)
        slope = [self._slopes[id(t)] if id(t) in self._slopes else torch.zeros_like(t) for t in self._targets]
        if clip and grad_norm is not None:
            torch._foreach_mul_(slope, (clip / (torch.as_tensor(grad_norm) + 1e-6)).clamp(max=1.0))
        return StepRecord(point, slope)

    def _stepped(self) -> list[tuple[dict[str, Any], Tensor]]:
        return [
            (group, parameter)
            for group in self._optimizer.param_groups
            for parameter in group["params"]
            if id(parameter) in self._wanted and parameter.grad is not None
        ]

    def _before(self, *_arguments: object) -> None:
        for _group, parameter in self._stepped():
            self._points[id(parameter)] = parameter.detach().clone()

    def _after(self, *_arguments: object) -> None:
        for group, parameter in self._stepped() if self._with_slope else ():
            moments = self._optimizer.state[parameter]
            assert parameter.grad is not None
            self._slopes[id(parameter)] = adamw_slope(
                parameter.grad,
                moments["exp_avg"],
                moments["exp_avg_sq"],
                int(moments["step"]),
                group["betas"],
                group["eps"],
            )
