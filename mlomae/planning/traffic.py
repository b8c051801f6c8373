"""What one rank sends: bytes of every collective of an average outer iteration.

A ring of n ranks sends (n - 1) / n of a tensor to reduce it to shards, as much to gather it from shards, and
twice as much to reduce it everywhere. What only log lines and checkpoints send is left out, and
so are the head's gradients of ``best_response: implicit``, one per residual until its solver is content.
"""

from __future__ import annotations

from dataclasses import dataclass

from mlomae.planning.activations import BF16, FLOAT32
from mlomae.planning.memory import Memory
from mlomae.planning.parameters import Weights


@dataclass(frozen=True)
class Transfer:
    """Collectives of one kind.

    Attributes:
        part: of the outer iteration.
        what: the tensors, in words.
        times: how often in an average outer iteration.
        bytes: that a rank sends each time.
    """

    part: str
    what: str
    times: float
    bytes: int

    @property
    def total(self) -> float:
        """Bytes in an average outer iteration."""
        return self.times * self.bytes


def transfers(memory: Memory) -> list[Transfer]:
    """All of them; empty for one rank."""
    config, sharding = memory.config, memory.sharding
    if sharding.ranks == 1:
        return []
    steps, parts = config.pretrain.unroll_steps, config.pretrain.micro_batches
    found = _step(memory, "pretrain", memory.autoencoder, steps, parts)
    if not config.masking.learns:
        # Policy hard steps its masking network in every iteration.
        own = [entry for network in memory.small for entry in _step(memory, "mask", network, 1, 1)]
        return [entry for entry in [*found, *own] if entry.total]
    due = 1 / config.hypergradient.every
    found += _direction(memory, due)
    found += _influence(memory, due)
    if sharding.zero == 3:
        found.append(_gather(memory, "head", "encoder, for features", memory.encoder, 1 - due))
    head, network = memory.small
    # Its own step and, where it answers, the look-ahead step's gradient and the held-out one.
    found += _step(memory, "head", head, 1, 1)
    if config.levels == 3:
        found.append(Transfer("head", "gradients of its answer", 2 * due, 2 * _ring(memory, _float32(head))))
    return [entry for entry in [*found, *_step(memory, "mask", network, due, 1)] if entry.total]


def _step(memory: Memory, part: str, weights: Weights, steps: float, micro_batches: int) -> list[Transfer]:
    sharding = memory.sharding
    gradients = _ring(memory, _narrow(memory, weights))
    if sharding.zero == 0:
        return [Transfer(part, "gradients, reduced everywhere", steps, 2 * gradients)]
    # ZeRO 1 adds up micro-batches on its own; 2 and 3 reduce each of them.
    reduced = steps * (1 if sharding.zero == 1 else micro_batches)
    found = [Transfer(part, "gradients, reduced to shards", reduced, gradients)]
    if sharding.zero < 3:
        whole = _ring(memory, _float32(weights))
        return [*found, Transfer(part, "weights after the step, gathered", steps, whole)]
    passes = 1 + (weights.trainable > sharding.reuse)
    return [_gather(memory, part, "weights, gathered", weights, passes * reduced), *found]


def _direction(memory: Memory, due: float) -> list[Transfer]:
    sharding, weights = memory.sharding, memory.encoder
    gradients = _ring(memory, _narrow(memory, weights))
    if sharding.zero == 0:
        # Through the module, not DeepSpeed's engine: float32 in any case.
        return [Transfer("direction", "v, reduced everywhere", due, 2 * _ring(memory, _float32(weights)))]
    found = [Transfer("direction", "v, reduced to shards", due, gradients)]
    if sharding.zero < 3:
        return found
    passes = 1 + (weights.trainable > sharding.reuse)
    return [_gather(memory, "direction", "encoder, gathered", weights, passes * due), *found]


def _influence(memory: Memory, due: float) -> list[Transfer]:
    sharding, name = memory.sharding, memory.estimator
    evaluations = {"fd": 2, "fd-forward": 1}.get(name, 1)
    if sharding.zero == 0:
        return []
    whole = _ring(memory, _float32(memory.autoencoder))
    if sharding.zero == 3:
        # In float32 always: bf16 would swallow the perturbation.
        return [Transfer("influence", "moved weights, gathered", evaluations * due, whole)]
    if name == "jvp":
        return [Transfer("influence", "weights before the step and v, gathered", 2 * due, whole)]
    # Each move, and the way back.
    return [Transfer("influence", "moved weights, gathered", (1 + evaluations) * due, whole)]


def _gather(memory: Memory, part: str, what: str, weights: Weights, times: float) -> Transfer:
    """ZeRO 3 gathers in the precision in which DeepSpeed reduces."""
    return Transfer(part, what, times, _ring(memory, _narrow(memory, weights)))


def _ring(memory: Memory, size: int) -> int:
    ranks = memory.sharding.ranks
    return round(size * (ranks - 1) / ranks)


def _float32(weights: Weights) -> int:
    return FLOAT32 * weights.trainable


def _narrow(memory: Memory, weights: Weights) -> int:
    """Bytes of gradients as they travel: those of products in bf16, where ZeRO 1, 2 or 3 runs autocast."""
    if not memory.sharding.bf16 or memory.sharding.zero == 0:
        return _float32(weights)
    return _float32(weights) - (FLOAT32 - BF16) * weights.products
