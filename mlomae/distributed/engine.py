"""An engine owns the module and the optimizer of one level; this file holds the plain torch one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mlomae.distributed import collectives
from mlomae.distributed.recorder import StepCounter, StepRecord, StepRecorder
from mlomae.distributed.shards import host_copies
from mlomae.mlo.space import TensorSpace, WeightSpace, global_norm
from mlomae.sections import LevelConfig

MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's per-parameter state."""
# Scale and shift vectors and learned tokens are not decayed (He et al. 2022).
NOT_DECAYED = ("cls_token", "mask_token", "pos_embed")


class Engine(Protocol):
    """What a level needs. Every method is called on all ranks together.

    Attributes:
        module: the bare module, for evaluations outside the level's own step. Gradients taken
            through it are this rank's alone.
        grad_norm: norm of the last step's gradient before clipping, None before the first.
        skipped_steps: steps that were not taken because a gradient was not finite; maybe on the device.
    """

    module: nn.Module

    @property
    def grad_norm(self) -> Tensor | float | None:
        """See above; a property, so that an engine may promise less."""

    @property
    def skipped_steps(self) -> Tensor | int:
        """See above."""

    def __call__(self, *inputs: Any) -> Any:
        """The module's output in the engine's precision, for a loss given to ``descend``."""

    def accumulate(self, loss: Tensor) -> None:
        """Backward of a micro-batch before the last one; its gradient counts as one of ``micro_batches``."""

    def descend(self, loss: Tensor, lr: float) -> None:
        """Backward, mean of the gradients over micro-batches and ranks, clipping, one optimizer step."""

    def descend_recorded(self, loss: Tensor, lr: float, slope: bool) -> StepRecord:
        """``descend``, and where it started, in the engine's weight space.

        Args:
            slope: record the derivative of the AdamW step too.
        """

    def weight_space(self, prefix: str) -> WeightSpace:
        """All trainable weights as a vector, of which directions move those that ``prefix`` names."""

    def autocast(self) -> AbstractContextManager[Any]:
        """A fresh context with the engine's precision, for evaluations through ``module``."""

    def snapshot(self) -> dict[str, Tensor]:
        """Weights and optimizer state as whole tensors by name on rank 0, {} on the others.

        They lie in host memory that nobody changes: training may go on while they are written. Names are
        ``weight.<name>``, ``exp_avg.<name>``, ``exp_avg_sq.<name>`` and ``step``, whatever is sharded; the
        moments are missing before the first step.
        """

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of what ``snapshot`` holds once a step was taken."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores a ``snapshot``, taken by any engine on any number of ranks.

        Args:
            state: on every rank; read one tensor at a time, which it may load when asked.
        """

    def whole_module(self) -> nn.Module:
        """The module with all weights on every rank, for what is more than a forward pass.

        ``module`` itself, or a copy of it without hooks where its weights are sharded.
        """

    def weight_norm(self) -> Tensor:
        """Norm of all trainable weights, 0-dim; not finite once a step has broken them."""


def build_adamw(module: nn.Module, config: LevelConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only.

    Args:
        module: its trainable parameters are optimised.
        config: rates of the level.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or name.rsplit(".", 1)[-1] in NOT_DECAYED
            (plain if exempt else decayed).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    # Fused: one pass over weights, gradients and moments, on the CPU too.
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def trainable(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Named parameters that receive gradients."""
    return ((name, p) for name, p in module.named_parameters() if p.requires_grad)


class TorchEngine:
    """Plain data parallelism: replicated weights, gradients averaged after backward.

    Args:
        mixed: run the passes under bf16 autocast; weights are float32 in any case.
        micro_batches: losses per step.
    """

    def __init__(
        self, module: nn.Module, config: LevelConfig, mixed: bool = False, micro_batches: int = 1
    ) -> None:
        self.module = module
        self.optimizer = build_adamw(module, config)
        self.micro_batches = micro_batches
        self._counter = StepCounter(self.optimizer)
        self.clip = config.clip
        self.mixed = mixed
        self.grad_norm: Tensor | None = None
        self.skipped_steps: Tensor | int = 0
        self._parameters: list[Tensor] = [parameter for _, parameter in trainable(module)]

    def __call__(self, *inputs: Any) -> Any:
        with self.autocast():
            return self.module(*inputs)

    def accumulate(self, loss: Tensor) -> None:
        (loss / self.micro_batches).backward()

    def descend(self, loss: Tensor, lr: float) -> None:
        self.accumulate(loss)
        gradients = collectives.average(
            [parameter.grad for parameter in self._parameters if parameter.grad is not None]
        )
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = gradient
        self.grad_norm = nn.utils.get_total_norm(gradients)
        if self.clip:
            nn.utils.clip_grads_with_norm_(self._parameters, self.clip, self.grad_norm)
        set_lr(self.optimizer, lr)
        bad = ~self.grad_norm.isfinite()
        self.skipped_steps = self.skipped_steps + bad
        # A fused optimizer looks there, on the device, whether to take the step: no host has to wait.
        self.optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        self.optimizer.step()
        # What comes next, the backward pass of the hypergradient, has a use for their memory.
        self.optimizer.zero_grad(set_to_none=True)

    def descend_recorded(self, loss: Tensor, lr: float, slope: bool) -> StepRecord:
        with StepRecorder(self.optimizer, self._counter, list(self._parameters), slope) as recorder:
            self.descend(loss, lr)
        return recorder.record(self.grad_norm, self.clip)

    def weight_space(self, prefix: str) -> WeightSpace:
        return TensorSpace(dict(trainable(self.module)), prefix, collectives.average)

    def autocast(self) -> AbstractContextManager[Any]:
        if not self.mixed:
            return nullcontext()
        return torch.autocast(self._parameters[0].device.type, torch.bfloat16)

    def snapshot(self) -> dict[str, Tensor]:
        state = {f"weight.{name}": value for name, value in self.module.state_dict().items()}
        step = torch.zeros(())
        for name, parameter in trainable(self.module):
            moments = self.optimizer.state.get(parameter)
            if moments:
                step = moments["step"]
                state.update({f"{key}.{name}": moments[key] for key in MOMENTS})
        # The host's count does not know of skipped steps. From here on it is what a resumed run counts.
        self._counter.restart(int(step))
        return host_copies({**state, "step": step}, self._parameters[0].device)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return state_shapes(self.module)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        load_weights(self.module, state)
        self._counter.restart(int(state["step"]))
        load_moments(self.optimizer, dict(trainable(self.module)), state)

    def whole_module(self) -> nn.Module:
        return self.module

    def weight_norm(self) -> Tensor:
        return global_norm(self._parameters)


def state_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """``Engine.shapes`` of an engine with this module, before anything is sharded."""
    shapes = {f"weight.{name}": tuple(value.shape) for name, value in module.state_dict().items()}
    for name, parameter in trainable(module):
        shapes |= {f"{key}.{name}": tuple(parameter.shape) for key in MOMENTS}
    return {**shapes, "step": ()}


@torch.no_grad()
def load_weights(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copies the weights and buffers of a snapshot into a module whose weights are whole."""
    for name, value in module.state_dict().items():
        value.copy_(state[f"weight.{name}"])


def load_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> None:
    """Replaces AdamW's state by a snapshot's.

    Args:
        parameters: whole, by name.
    """
    optimizer.state.clear()
    if not state["step"]:
        return
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {
            "step": state["step"].to(parameter.device, copy=True),
            **{key: state[f"{key}.{name}"].to(parameter, copy=True) for key in MOMENTS},
        }


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every parameter group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
