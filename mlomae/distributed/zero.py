"""The weights of a DeepSpeed engine under ZeRO 1, 2 and 3 as a vector: this rank's flat shards.

DeepSpeed keeps the weights it updates as one flat float32 tensor per parameter group and rank. A
direction has the same layout: no rank holds more of v than its shard.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlomae.distributed import collectives
from mlomae.distributed.engine import trainable
from mlomae.mlo.space import Vector, WeightSpace, global_norm, move_into


class ShardSpace(WeightSpace):
    """What ZeRO 1-3 have in common.

    Args:
        engine: DeepSpeed's engine.
        module: its module.
        prefix: see ``WeightSpace``.
    """

    def __init__(self, engine: Any, module: nn.Module, prefix: str) -> None:
        self.prefix = prefix
        self._engine = engine
        self._optimizer = engine.optimizer
        self._names = {id(parameter): name for name, parameter in trainable(module)}
        self._moved = [p for name, p in trainable(module) if name.startswith(prefix)]

    @abstractmethod
    def stepped(self) -> list[Tensor]:
        """The tensors that the optimizer steps, in the order of ``values``."""

    @torch.no_grad()
    def write(self, values: Iterable[Tensor]) -> None:
        for shard, value in zip(self.values(), values, strict=True):
            shard.copy_(value)
        self._refresh()

    @torch.no_grad()
    def move(self, point: Vector, direction: Vector, eps: Tensor) -> None:
        move_into(self.values(), point, direction, eps)
        self._refresh()

    @abstractmethod
    def _refresh(self) -> None:
        """Lets forward passes see the shards as they are."""

    def gradient(self, output: Tensor, cotangent: Tensor) -> list[Tensor]:
        # A backward pass of its own, whatever pretrain.micro_batches says.
        self._engine.set_gradient_accumulation_boundary(True)
        try:
            self._engine.backward((output * cotangent).sum(), scale_wrt_gas=False)
            vector = [self._gradient_shard(i, target) for i, target in enumerate(self.stepped())]
        finally:
            self._engine.set_gradient_accumulation_boundary(None)  # DeepSpeed counts again
        # DeepSpeed would add them to the next step's.
        self._optimizer.zero_grad()
        for pending in self._pending_gradients():
            for group in pending:
                pending[group] = None
        return vector

    def norm(self, vector: Vector) -> Tensor:
        return collectives.total(global_norm(vector).square()).sqrt()

    @abstractmethod
    def _gradient_shard(self, group: int, target: Tensor) -> Tensor:
        """This rank's part of the last backward pass's gradient, laid out like ``target``."""

    @abstractmethod
    def _pending_gradients(self) -> list[dict[int, Any]]:
        """Where DeepSpeed keeps gradients that wait for a step, by group."""


class ReplicatedShardSpace(ShardSpace):
    """ZeRO 1 and 2: optimizer and gradients are sharded, every rank's module holds whole weights."""

    def values(self) -> list[Tensor]:
        optimizer = self._optimizer
        groups = zip(
            optimizer.parallel_partitioned_bit16_groups, optimizer.real_dp_process_group, strict=True
        )
        return [shards[dist.get_rank(group)].detach() for shards, group in groups]

    def stepped(self) -> list[Tensor]:
        return list(self._optimizer.single_partition_of_fp32_groups)

    def _refresh(self) -> None:
        for whole, shards, group in zip(
            self._optimizer.bit16_groups_flat,
            self._optimizer.parallel_partitioned_bit16_groups,
            self._optimizer.real_dp_process_group,
            strict=True,
        ):
            if len(shards) > 1:
                # The shards are slices of the whole, which the module's parameters are views of.
                dist.all_gather(list(shards), shards[dist.get_rank(group)].clone(), group=group)
            assert shards[0].data_ptr() == whole.data_ptr()

    def scale(self) -> Tensor:
        return global_norm(self._moved)

    def whole(self, vector: Vector) -> dict[str, Tensor]:
        named = {}
        for i, shard in enumerate(vector):
            group = self._optimizer.real_dp_process_group[i]
            shards = [torch.empty_like(shard) for _ in range(dist.get_world_size(group))]
            dist.all_gather(shards, shard.contiguous(), group=group)
            flat, offset = torch.cat(shards), 0
            for parameter in self._optimizer.round_robin_bit16_groups[i]:
                piece = flat[offset : offset + parameter.numel()]
                named[self._names[id(parameter)]] = piece.view_as(parameter)
                offset += parameter.numel()
        return named

    def _gradient_shard(self, group: int, target: Tensor) -> Tensor:
        flat = self._optimizer._get_preflattened_grad_partition(group)
        if flat is None:
            flat = torch.cat([grad.flatten() for grad in self._optimizer.averaged_gradients[group]])
        shard = torch.zeros_like(target)
        # The last rank's shard is longer than its parameters by the padding.
        shard[: flat.numel()].copy_(flat)
        return shard

    def _pending_gradients(self) -> list[dict[int, Any]]:
        return [self._optimizer.averaged_gradients, self._optimizer.all_grad_tensors]


class PartitionedShardSpace(ShardSpace):
    """ZeRO 3: the weights are sharded too; a module's parameters are empty between forward passes."""

    has_whole_vectors = False

    def values(self) -> list[Tensor]:
        return [flat.detach() for flat in self._optimizer.fp16_partitioned_groups_flat]

    def stepped(self) -> list[Tensor]:
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def _refresh(self) -> None:
        # Small parameters stay gathered between passes, and would keep their old values.
        coordinator = self._optimizer.parameter_offload.get_param_coordinator()
        coordinator.release_and_reset_all(self._engine.module)

    def scale(self) -> Tensor:
        square = torch.stack([_own_part(p).square().sum() for p in self._moved]).sum()
        return collectives.total(square).sqrt()

    def whole(self, vector: Vector) -> dict[str, Tensor]:
        raise RuntimeError("ZeRO 3 holds no whole weights: see has_whole_vectors")

    def _gradient_shard(self, group: int, target: Tensor) -> Tensor:
        # One buffer per parameter, which keeps the last step's gradient where this pass had none.
        parts = [
            grad.flatten()
            if self._names[id(parameter)].startswith(self.prefix)
            else torch.zeros_like(grad).flatten()
            for parameter, grad in zip(
                self._optimizer.fp16_groups[group], self._optimizer.averaged_gradients[group], strict=True
            )
        ]
        return torch.cat(parts).to(target.dtype)

    def _pending_gradients(self) -> list[dict[int, Any]]:
        return [self._optimizer.averaged_gradients]


def _own_part(parameter: Any) -> Tensor:
    """This rank's part of a ZeRO 3 parameter, without padding."""
    part: Tensor = parameter.ds_tensor.detach().flatten()
    before = dist.get_rank(parameter.ds_process_group) * part.numel()
    return part[: max(0, parameter.ds_numel - before)]
