"""The DeepSpeed engine of one level (ZeRO 0 to 3); the only module that imports deepspeed."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mlomae.distributed import collectives
from mlomae.distributed.ds_config import merge, zero_stage
from mlomae.distributed.engine import (
    MOMENTS,
    build_adamw,
    load_moments,
    load_weights,
    set_lr,
    state_shapes,
    trainable,
)
from mlomae.distributed.env import World
from mlomae.distributed.recorder import StepCounter, StepRecord, StepRecorder
from mlomae.distributed.shards import fill_shard, gather_shard, host_copies
from mlomae.distributed.zero import PartitionedShardSpace, ReplicatedShardSpace, ShardSpace
from mlomae.errors import UserError
from mlomae.mlo.space import TensorSpace, WeightSpace, global_norm
from mlomae.sections import LevelConfig


def _import_deepspeed(device: torch.device) -> Any:
    try:
        import deepspeed
        import deepspeed.ops
    except ImportError as error:
        raise UserError(f"--deepspeed_config: deepspeed cannot be imported ({error})") from None
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It gathers by names that newer releases of torch deprecate, and would say so at every gathering.
    warnings.filterwarnings("ignore", r".torch\.distributed\.\w+. is deprecated", FutureWarning)
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


def _limit_bucket(full: dict[str, Any], numel: int) -> None:
    """No more memory for waiting gradients than there are gradients: DeepSpeed takes all of it at once, for
    every engine.
    """
    section = full.get("zero_optimization", {})
    if section.get("stage", 0):
        wanted = section.get("reduce_bucket_size", numel)
        full["zero_optimization"] = {**section, "reduce_bucket_size": min(wanted, numel)}


class DeepSpeedEngine:
    """ZeRO data parallelism; float32 weights, precision of the passes by ``torch_autocast``.

    Under ZeRO 0-2 every rank holds the full weights between steps, so evaluations and perturbations
    through ``module`` work as they do in plain torch. Under ZeRO 3 ``module`` gathers its weights by hooks:
    it can be called, its weights cannot be read.
    """

    def __init__(
        self,
        module: nn.Module,
        config: LevelConfig,
        ds_config: dict[str, Any],
        world: World,
        micro_batches: int = 1,
    ) -> None:
        self._deepspeed = deepspeed = _import_deepspeed(world.device)
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        deepspeed.init_distributed(backend, verbose=False, auto_mpi_discovery=False)
        full = merge(ds_config, config, world.size, micro_batches)
        _check(deepspeed, full)
        _limit_bucket(full, sum(parameter.numel() for _, parameter in trainable(module)))
        self._stage = zero_stage(ds_config)
        self._shapes = state_shapes(module)
        self._blank: nn.Module | None = None
        if self._stage == 3:
            self._blank = _blank_copy(module)
            # A block's weights are gathered in one collective, and stay while its lean parts read them.
            deepspeed.utils.set_z3_leaf_modules(module, [Block], raise_if_not_found=False)
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
        self._skipped = 0
        precision = ds_config.get("torch_autocast", {})
        self._autocast = bool(precision.get("enabled"))
        self._device = world.device
        self._counter = StepCounter(self._base_optimizer)

    def __call__(self, *inputs: Any) -> Any:
        return self._engine(*inputs)

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
            if not self.grad_norm.isfinite():
                # As DeepSpeed does under ZeRO 1-3. Its step would clip, which needs gradients.
                self._skipped += 1
                self._engine.zero_grad()
                self._engine.micro_steps += 1
                return
        self._engine.step()
        if self._stage:
            self.grad_norm = self._engine.get_global_grad_norm()

    def descend_recorded(self, loss: Tensor, lr: float, slope: bool) -> StepRecord:
        if self._stage:
            targets = self._shards.stepped()
        else:
            targets = [parameter for _, parameter in trainable(self.module)]
        with StepRecorder(self._base_optimizer, self._counter, targets, slope) as recorder:
            self.descend(loss, lr)
        return recorder.record(self.grad_norm, self._clip)

    def weight_space(self, prefix: str) -> WeightSpace:
        if self._stage:
            return self._shard_space(prefix)
        return TensorSpace(dict(trainable(self.module)), prefix, collectives.average)

    @cached_property
    def _shards(self) -> ShardSpace:
        """All weights, for what every step or checkpoint asks of them."""
        return self._shard_space("")

    def _shard_space(self, prefix: str) -> ShardSpace:
        kind = PartitionedShardSpace if self._stage == 3 else ReplicatedShardSpace
        return kind(self._engine, self.module, prefix)

    def autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16) if self._autocast else nullcontext()

    @property
    def skipped_steps(self) -> int:
        return int(self._engine.skipped_steps) + self._skipped

    def snapshot(self) -> dict[str, Tensor]:
        base, step = self._base_optimizer, torch.zeros(())
        if self._stage:
            space = self._shards
            weights, moments = space.snapshot(), {}
            for target, pieces in zip(space.stepped(), space.pieces(), strict=True):
                for key in MOMENTS if target in base.state else ():
                    whole = gather_shard(base.state[target][key], pieces, self._device)
                    moments.update({f"{key}.{name}": moment for name, moment in whole.items()})
        else:
            weights = host_copies(self.module.state_dict(), self._device)
            moments = host_copies(
                {
                    f"{key}.{name}": base.state[parameter][key]
                    for name, parameter in trainable(self.module)
                    for key in (MOMENTS if parameter in base.state else ())
                },
                self._device,
            )
        if not collectives.is_primary():
            return {}
        for state in base.state.values():
            step = state["step"].detach().to("cpu", copy=True)
        named = {f"weight.{name}": weight for name, weight in weights.items()}
        # In the order of the module, whatever the groups are.
        names = [f"{key}.{name}" for name, _ in trainable(self.module) for key in MOMENTS]
        return {**named, **{name: moments[name] for name in names if name in moments}, "step": step}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._counter.restart(int(state["step"]))
        base = self._base_optimizer
        if not self._stage:
            load_weights(self.module, state)
            load_moments(base, dict(trainable(self.module)), state)
            return
        space = self._shards
        space.load(state)
        base.state.clear()
        # DeepSpeed keeps views of the moments that it had.
        self._engine.optimizer._hp_optimizer_states_linked = False
        if not state["step"]:
            return
        for target, pieces in zip(space.stepped(), space.pieces(), strict=True):
            moments = {key: torch.empty_like(target) for key in MOMENTS}
            for key, moment in moments.items():
                fill_shard(moment, pieces, state, f"{key}.")
            base.state[target] = {"step": state["step"].to(target.device, copy=True), **moments}

    def whole_module(self) -> nn.Module:
        if self._blank is None:
            return self.module
        buffers = dict(self.module.named_buffers())
        whole: dict[int, Tensor] = {
            id(blank): buffers[name].clone() for name, blank in self._blank.named_buffers()
        }
        gathered = dict(self.module.named_parameters())
        for name, blank in self._blank.named_parameters():
            with self._deepspeed.zero.GatheredParameters([gathered[name]]):
                value = gathered[name].detach().clone()
            whole[id(blank)] = nn.Parameter(value, blank.requires_grad)
        copied: nn.Module = copy.deepcopy(self._blank, whole)
        return copied

    def weight_norm(self) -> Tensor:
        if self._stage == 3:
            return self._shards.scale()
        return global_norm([parameter for _, parameter in trainable(self.module)])

    @property
    def _base_optimizer(self) -> torch.optim.Optimizer:
        optimizer: torch.optim.Optimizer = (
            self._engine.optimizer.optimizer if self._stage else self._engine.optimizer
        )
        return optimizer


def _blank_copy(module: nn.Module) -> nn.Module:
    """A copy of the module whose parameters have no memory."""
    blanks = {
        id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), parameter.requires_grad)
        for parameter in module.parameters()
    }
    copied: nn.Module = copy.deepcopy(module, blanks)
    return copied
