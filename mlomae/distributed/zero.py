"""The weights of a DeepSpeed engine under ZeRO 1, 2 and 3 as a vector: this rank's flat shards.

DeepSpeed keeps the weights it updates as one flat float32 tensor per parameter group and rank. A
direction has the same layout: no rank holds more of v than its shard.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mlomae.distributed import collectives
from mlomae.distributed.engine import load_weights, trainable
from mlomae.distributed.shards import Member, Piece, fill_shard, gather_shard, host_copies
from mlomae.mlo.space import Vector, WeightSpace, global_norm, move_into


class ShardSpace(WeightSpace):
    """What ZeRO 1-3 have in common.

    Under ``offload_optimizer`` vectors lie in host memory, like the tensors that the optimizer steps.

    Args:
        engine: DeepSpeed's engine.
        module: its module.
        prefix: see ``WeightSpace``.
    """

    def __init__(self, engine: Any, module: nn.Module, prefix: str) -> None:
        self.prefix = prefix
        self._engine = engine
        self._optimizer = engine.optimizer
        self._module = module
        self._names = {id(parameter): name for name, parameter in trainable(module)}
        self._moved = [p for name, p in trainable(module) if name.startswith(prefix)]

    @property
    def device(self) -> torch.device:
        """Where passes run and collectives start."""
        return torch.device(self._engine.device)

    @abstractmethod
    def stepped(self) -> list[Tensor]:
        """The tensors that the optimizer steps, in the order of ``values``."""

    @abstractmethod
    def pieces(self) -> list[list[Piece]]:
        """What each of them consists of."""

    @abstractmethod
    def snapshot(self) -> dict[str, Tensor]:
        """All weights and buffers in host memory of rank 0, by name; {} elsewhere."""

    @abstractmethod
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Replaces all weights and buffers by those of a snapshot."""

    @torch.no_grad()
    def write(self, values: Iterable[Tensor]) -> None:
        for shard, value in zip(self.values(), values, strict=True):
            shard.copy_(value)
        self._refresh()

    @torch.no_grad()
    def move(self, point: Vector, direction: Vector, eps: Tensor) -> None:
        shards = self.values()
        if all(shard.device == v.device for shard, v in zip(shards, direction, strict=True)):
            move_into(shards, point, direction, eps)
        else:
            for shard, start, v in zip(shards, point, direction, strict=True):
                shard.copy_(torch.addcmul(start.to(v.device), v, eps.to(v.device)))
        self._refresh()

    @abstractmethod
    def _refresh(self) -> None:
        """Lets forward passes see the shards as they are."""

    def gradient(self, output: Tensor, cotangent: Tensor) -> list[Tensor]:
        # A backward pass of its own, whatever pretrain.micro_batches says.
        self._engine.set_gradient_accumulation_boundary(True)
        try:
            self._engine.backward((output * cotangent).sum(), scale_wrt_gas=False)
            if self._offloaded:
                pairs = zip(self.stepped(), self.pieces(), strict=True)
                vector = [self._offloaded_gradient(*pair) for pair in pairs]
            else:
                vector = [self._gradient_shard(i, target) for i, target in enumerate(self.stepped())]
        finally:
            self._engine.set_gradient_accumulation_boundary(None)  # DeepSpeed counts again
        # DeepSpeed would add them to the next step's.
        self._optimizer.zero_grad()
        self._drop_pending_gradients()
        return vector

    def norm(self, vector: Vector) -> Tensor:
        return collectives.total(global_norm(vector).square().to(self.device)).sqrt()

    @property
    @abstractmethod
    def _offloaded(self) -> bool:
        """Whether the optimizer's tensors lie in host memory."""

    def _offloaded_gradient(self, target: Tensor, pieces: Sequence[Piece]) -> Tensor:
        """A copy of the gradient that waits for a step, in host memory."""
        assert target.grad is not None
        vector = target.grad.detach().clone()
        # Where this pass had no gradient, the last step's is still there.
        start = 0
        for piece in pieces:
            first = collectives.rank() * piece.size
            for member in piece.members:
                if not member.name.startswith(self.prefix):
                    low, high = member.offset - first, member.offset - first + member.shape.numel()
                    vector[start + max(low, 0) : start + max(min(high, piece.size), 0)] = 0.0
            start += piece.size
        return vector

    @abstractmethod
    def _gradient_shard(self, group: int, target: Tensor) -> Tensor:
        """This rank's part of the last backward pass's gradient, laid out like ``target``."""

    @abstractmethod
    def _drop_pending_gradients(self) -> None:
        """Forgets gradients that wait for a step."""


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

    def pieces(self) -> list[list[Piece]]:
        optimizer, layouts = self._optimizer, []
        for shard, group, offsets in zip(
            self.stepped(),
            optimizer.round_robin_bit16_groups,
            optimizer.round_robin_bit16_offsets,
            strict=True,
        ):
            places = zip(group, offsets, strict=True)
            members = [Member(self._names[id(p)], offset, p.shape) for p, offset in places]
            layouts.append([Piece(shard.numel(), members)])
        return layouts

    def snapshot(self) -> dict[str, Tensor]:
        return host_copies(self._module.state_dict(), self.device)

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        # The module's parameters are views of the flat weights, of which a shard is a slice.
        load_weights(self._module, state)
        for target, value in zip(self.stepped(), self.values(), strict=True):
            target.copy_(value)

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
        for shard, (piece,), group in zip(
            vector, self.pieces(), self._optimizer.real_dp_process_group, strict=True
        ):
            part = shard.to(self.device).contiguous()
            parts = [torch.empty_like(part) for _ in range(dist.get_world_size(group))]
            dist.all_gather(parts, part, group=group)
            flat = torch.cat(parts)
            named.update({member.name: member.of(flat) for member in piece.members})
        return named

    @property
    def _offloaded(self) -> bool:
        return bool(self._optimizer.cpu_offload)

    def _gradient_shard(self, group: int, target: Tensor) -> Tensor:
        flat = self._optimizer._get_preflattened_grad_partition(group)
        if flat is None:
            flat = torch.cat([grad.flatten() for grad in self._optimizer.averaged_gradients[group]])
        shard = torch.zeros_like(target)
        # The last rank's shard is longer than its parameters by the padding.
        shard[: flat.numel()].copy_(flat)
        return shard

    def _drop_pending_gradients(self) -> None:
        optimizer = self._optimizer
        for pending in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            for group in pending:
                pending[group] = None
        if self._offloaded:
            # As after a step: the next backward pass is a first one.
            optimizer.micro_step_id = -1
            optimizer.reset_cpu_buffers()


class PartitionedShardSpace(ShardSpace):
    """ZeRO 3: the weights are sharded too; a module's parameters are empty between forward passes."""

    has_whole_vectors = False

    def __init__(self, engine: Any, module: nn.Module, prefix: str) -> None:
        super().__init__(engine, module, prefix)
        # DeepSpeed's mark on the weights of products under autocast.
        self._rounded = {p: p.comm_dtype for p in module.parameters() if hasattr(p, "comm_dtype")}

    def values(self) -> list[Tensor]:
        return [flat.detach() for flat in self._optimizer.fp16_partitioned_groups_flat]

    def write(self, values: Iterable[Tensor]) -> None:
        self.gather_exactly(False)
        super().write(values)

    def move(self, point: Vector, direction: Vector, eps: Tensor) -> None:
        self.gather_exactly(True)
        super().move(point, direction, eps)

    def gather_exactly(self, exact: bool) -> None:
        """Whether to gather weights as they are; under autocast otherwise in bf16, which swallows a move."""
        for parameter, rounded in self._rounded.items():
            parameter.comm_dtype = parameter.dtype if exact else rounded

    def stepped(self) -> list[Tensor]:
        return list(self._optimizer.fp32_partitioned_groups_flat)

    def pieces(self) -> list[list[Piece]]:
        return [
            [_piece_of(self._names[id(parameter)], parameter) for parameter in group]
            for group in self._optimizer.fp16_groups
        ]

    def snapshot(self) -> dict[str, Tensor]:
        groups = [gather_shard(*pair, self.device) for pair in zip(self.values(), self.pieces(), strict=True)]
        frozen = [gather_shard(shard, [piece], self.device) for shard, piece in self._frozen()]
        sharded = dict(chain.from_iterable(named.items() for named in (*groups, *frozen)))
        sharded |= host_copies(dict(self._buffers()), self.device)
        return {name: sharded[name] for name in self._module.state_dict() if name in sharded}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        for target, value, pieces in zip(self.stepped(), self.values(), self.pieces(), strict=True):
            fill_shard(target, pieces, state, "weight.")
            value.copy_(target)
        for shard, piece in self._frozen():
            fill_shard(shard, [piece], state, "weight.")
        for name, buffer in self._buffers():
            buffer.copy_(state[f"weight.{name}"])
        self._refresh()

    def _frozen(self) -> Iterator[tuple[Tensor, Piece]]:
        """Parameters that do not train: they belong to no group."""
        for name, parameter in self._module.named_parameters():
            if not parameter.requires_grad:
                shard: Tensor = parameter.ds_tensor.detach()  # type: ignore[attr-defined]  # DeepSpeed's
                yield shard.flatten(), _piece_of(name, parameter)

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Those of the state dict; every rank holds them whole."""
        kept = self._module.state_dict().keys()
        return ((name, buffer) for name, buffer in self._module.named_buffers() if name in kept)

    def _refresh(self) -> None:
        # Small parameters stay gathered between passes, and would keep their old values.
        coordinator = self._optimizer.parameter_offload.get_param_coordinator()
        coordinator.release_and_reset_all(self._engine.module)

    def scale(self) -> Tensor:
        square = torch.stack([_own_part(p).square().sum() for p in self._moved]).sum()
        return collectives.total(square.to(self.device)).sqrt()

    def whole(self, vector: Vector) -> dict[str, Tensor]:
        raise RuntimeError("ZeRO 3 holds no whole weights: see has_whole_vectors")

    @property
    def _offloaded(self) -> bool:
        return bool(self._optimizer.offload_optimizer)

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

    def _drop_pending_gradients(self) -> None:
        for group in self._optimizer.averaged_gradients:
            self._optimizer.averaged_gradients[group] = None


def _piece_of(name: str, parameter: Any) -> Piece:
    """A ZeRO 3 parameter."""
    return Piece(parameter.partition_numel(), [Member(name, 0, parameter.ds_shape)])


def _own_part(parameter: Any) -> Tensor:
    """This rank's part of a ZeRO 3 parameter, without padding."""
    part: Tensor = parameter.ds_tensor.detach().flatten()
    before = dist.get_rank(parameter.ds_process_group) * part.numel()
    return part[: max(0, parameter.ds_numel - before)]
