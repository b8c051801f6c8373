"""The DeepSpeed engine of one level (ZeRO 0, 1 and 2); the only module that imports deepspeed."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from mlomae.distributed import collectives
from mlomae.distributed.ds_config import merge
from mlomae.distributed.engine import MOMENTS, build_adamw, set_lr, trainable, weights_of
from mlomae.distributed.env import World
from mlomae.distributed.recorder import StepCounter, StepRecord, StepRecorder
from mlomae.distributed.zero import PartitionedShardSpace, ReplicatedShardSpace, ShardSpace
from mlomae.errors import UserError
from mlomae.mlo.space import TensorSpace, WeightSpace
from mlomae.sections import LevelConfig


def _import_deepspeed(device: torch.device) -> Any:
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(f"--deepspeed_config: deepspeed cannot be imported ({error})") from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    if device.type == "cpu":
        # A shared-memory communication op that DeepSpeed would compile for minutes at start-up;
        # gloo does the same work.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def _check(deepspeed: Any, full: dict[str, Any]) -> None:
    """Lets DeepSpeed judge what it alone knows: the keys inside the sections."""
    try:
        deepspeed.DeepSpeedConfig(full)
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(
            f"--deepspeed_config: refused by DeepSpeed ({' '.join(str(error).split())})"
        ) from None


class DeepSpeedEngine:
    """ZeRO data parallelism; float32 weights, precision of the passes by ``torch_autocast``.

    Under ZeRO 0-2 every rank holds the full weights between steps, so evaluations and perturbations
    through ``module`` work as they do in plain torch.
    """

    def __init__(
        self,
        module: nn.Module,
        config: LevelConfig,
        ds_config: dict[str, Any],
        world: World,
        micro_batches: int = 1,
    ) -> None:
        deepspeed = _import_deepspeed(world.device)
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(backend, verbose=False, auto_mpi_discovery=False)
        full = merge(ds_config, config, world.size, micro_batches)
        _check(deepspeed, full)
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=build_adamw(module, config), config=full, dist_init_required=False
        )
        if module._compiled_call_impl is not None:
            # They only start and stop timers under ZeRO 0-2, and would be compiled with the module.
            self._engine.module_forward_pre_hook.remove()
            self._engine.module_forward_post_hook.remove()
        self.module = module
        self.grad_norm: Tensor | float | None = None
        self._clip = config.clip
        self._fragments = deepspeed.utils
        self._stage = ds_config.get("zero_optimization", {}).get("stage", 0)
        precision = ds_config.get("torch_autocast", {})
        self._autocast = bool(precision.get("enabled"))
        self._device_type = world.device.type
        self._counter = StepCounter(self._base_optimizer)

    def __call__(self, *inputs: Any) -> Tensor:
        output: Tensor = self._engine(*inputs)
        return output

    def accumulate(self, loss: Tensor) -> None:
        # Before the last one, DeepSpeed's step only counts.
        self._engine.backward(loss)
        self._engine.step()

    def descend(self, loss: Tensor, lr: float) -> None:
        set_lr(self._engine.optimizer, lr)
        self._engine.backward(loss)
        if not self._stage:
            # DeepSpeed reports no norm for ZeRO 0; the gradients are whole and averaged by now.
            gradients = [parameter.grad for _, parameter in trainable(self.module)]
            self.grad_norm = nn.utils.get_total_norm([g for g in gradients if g is not None])
        self._engine.step()
        if self._stage:
            self.grad_norm = self._engine.get_global_grad_norm()

    def descend_recorded(self, loss: Tensor, lr: float, slope: bool) -> StepRecord:
        if self._stage:
            targets = self._shard_space("").stepped()
        else:
            targets = [parameter for _, parameter in trainable(self.module)]
        with StepRecorder(self._base_optimizer, self._counter, targets, slope) as recorder:
            self.descend(loss, lr)
        return recorder.record(self.grad_norm, self._clip)

    def weight_space(self, prefix: str) -> WeightSpace:
        if self._stage:
            return self._shard_space(prefix)
        return TensorSpace(dict(trainable(self.module)), prefix, collectives.average)

    def _shard_space(self, prefix: str) -> ShardSpace:
        kind = PartitionedShardSpace if self._stage == 3 else ReplicatedShardSpace
        return kind(self._engine, self.module, prefix)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device_type, torch.bfloat16) if self._autocast else nullcontext()

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"weight.{name}": value for name, value in self.module.state_dict().items()}
        base = self._base_optimizer
        steps = [moments["step"] for moments in base.state.values() if "step" in moments]
        if not steps:
            return {**state, "step": torch.zeros(())}
        self._link_moments()
        for name, parameter in trainable(self.module):
            for key in MOMENTS:
                state[f"{key}.{name}"] = self._moment(parameter, key)
        return {**state, "step": steps[0].detach().cpu()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.module.load_state_dict(weights_of(state))
        if self._stage:
            for _, parameter in self.module.named_parameters():
                self._fragments.safe_set_full_fp32_param(parameter, parameter.detach())
        self._counter.restart(int(state["step"]))
        self._allocate_moments(state["step"])
        if not state["step"]:
            return
        for name, parameter in trainable(self.module):
            for key in MOMENTS:
                value = state[f"{key}.{name}"].to(parameter)
                if self._stage:
                    self._fragments.safe_set_full_optimizer_state(parameter, value, key)
                else:
                    self._base_optimizer.state[parameter][key].copy_(value)

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = (
            self._engine.optimizer.optimizer if self._stage else self._engine.optimizer
        )
        return optimizer

    def _moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        if self._stage:
            moment: Tensor = self._fragments.safe_get_full_optimizer_state(parameter, key)
            return moment
        return self._base_optimizer.state[parameter][key]

    def _allocate_moments(self, step: Tensor) -> None:
        """Creates the optimizer state that DeepSpeed would create at the first step."""
        for group in self._base_optimizer.param_groups:
            for flat in group["params"]:
                self._base_optimizer.state[flat] = {
                    "step": step.to(flat.device, copy=True),
                    **{key: torch.zeros_like(flat) for key in MOMENTS},
                }
        self._link_moments()

    def _link_moments(self) -> None:
        """Lets ``safe_get/set_full_optimizer_state`` find the moments of every parameter group.

        DeepSpeed links them once, after the first group's first step, when the later groups have none.
        """
        if self._stage:
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()
