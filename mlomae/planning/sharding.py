"""Who holds what: replicated weights, or ZeRO's shards and the buffers that come with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mlomae.planning.activations import FLOAT32
from mlomae.planning.parameters import Weights


@dataclass(frozen=True)
class Sharding:
    """How the ranks share a module; numbers, not bytes, where nothing else is said.

    Attributes:
        ranks: how many.
        stage: of ZeRO; None for plain torch, which replicates like stage 0.
        bucket: ``reduce_bucket_size``; the engine takes no more than the module has trainable weights.
        overlap: ``overlap_comm``, which doubles the bucket under ZeRO 1 and 2.
        reuse: what ZeRO 3 keeps gathered for the backward pass, ``stage3_max_reuse_distance`` and
            ``stage3_max_live_parameters``, whichever is less.
        prefetch: ``stage3_prefetch_bucket_size``.
        persistent: ``stage3_param_persistence_threshold``: smaller tensors stay gathered.
        offload: whether the optimizer's state and the master weights lie in host memory.
        offload_weights: whether ZeRO 3's shards of the weights do.
        bf16: whether DeepSpeed reduces (and under ZeRO 3 gathers) the weights of products in bf16.
    """

    ranks: int
    stage: int | None = None
    bucket: int = 500_000_000
    overlap: bool = False
    reuse: int = 1_000_000_000
    prefetch: int = 50_000_000
    persistent: int = 100_000
    offload: bool = False
    offload_weights: bool = False
    bf16: bool = False

    @property
    def zero(self) -> int:
        """The stage, 0 for plain torch."""
        return self.stage or 0

    @property
    def name(self) -> str:
        return "plain torch" if self.stage is None else f"ZeRO {self.stage}"

    def share(self, numbers: int) -> int:
        """A rank's part of numbers that are sharded."""
        return -(-numbers // self.ranks)

    def vector(self, numbers: int) -> int:
        """Numbers of a vector of the weight space on one rank: v, a copy of the weights."""
        return self.share(numbers) if self.zero else numbers

    def weights(self, weights: Weights) -> int:
        """Bytes that the weights take between steps, in the precision that the passes read."""
        if self.zero < 3:
            return FLOAT32 * weights.all
        small = sum(size for size in weights.tensors if size <= self.persistent)
        return FLOAT32 * (small if self.offload_weights else self.share(weights.all) + small)

    def gathered(self, weights: Weights, largest: int) -> int:
        """Bytes of whole weights that lie beside the shards while ZeRO 3 passes through the layers.

        Args:
            largest: bytes of the largest layer.
        """
        if self.zero < 3:
            return 0
        large = sum(size for size in weights.tensors if size > self.persistent)
        kept = max(min(large, self.reuse), min(large, largest // FLOAT32 + self.prefetch))
        return FLOAT32 * kept

    def optimizer(self, weights: Weights) -> int:
        """Bytes of both moments, and of the float32 weights that ZeRO steps beside those of the passes."""
        copies = 3 if self.zero else 2
        return FLOAT32 * copies * self.vector(weights.trainable)

    def gradient_shard(self, weights: Weights) -> int:
        """Bytes of a rank's part of the gradients that ZeRO 3 never gives back."""
        return FLOAT32 * self.share(weights.trainable) if self.zero == 3 else 0

    def buckets(self, weights: Weights) -> int:
        """Bytes of the buffers in which gradients wait to be reduced, while they exist."""
        bucket = min(weights.trainable, self.bucket)
        if self.zero == 0:
            # DeepSpeed's own reduction copies gradients into one flat tensor.
            return FLOAT32 * bucket if self.stage == 0 and self.ranks > 1 else 0
        if self.zero == 3:
            return bucket * (FLOAT32 + (2 if self.bf16 else 0))
        return FLOAT32 * bucket * (1 + self.overlap) * (1 + self.bf16)


def shipped(stage: int) -> dict[str, Any]:
    """A DeepSpeed configuration with the stage and the sizes of that in ``ds_configs/``."""
    sizes: dict[str, Any] = {"overlap_comm": stage >= 2, "reduce_bucket_size": 25_000_000} if stage else {}
    if stage == 3:
        sizes |= {
            "stage3_prefetch_bucket_size": 25_000_000,
            "stage3_param_persistence_threshold": 10_000,
            "stage3_max_live_parameters": 100_000_000,
            "stage3_max_reuse_distance": 25_000_000,
        }
    return {"zero_optimization": {"stage": stage, **sizes}}


def read_sharding(ds_config: Mapping[str, Any], ranks: int, bf16: bool) -> Sharding:
    """From a checked DeepSpeed configuration.

    Args:
        bf16: whether the passes run under autocast.
    """
    zero = ds_config.get("zero_optimization", {})
    default = Sharding(ranks)
    reuse = min(
        int(zero.get(f"stage3_{name}", default.reuse))
        for name in ("max_reuse_distance", "max_live_parameters")
    )
    stage = int(zero.get("stage", 0))
    return Sharding(
        ranks=ranks,
        stage=stage,
        bucket=int(zero.get("reduce_bucket_size", default.bucket)),
        # DeepSpeed's default depends on the stage.
        overlap=bool(zero.get("overlap_comm", stage == 3)),
        reuse=reuse,
        prefetch=int(zero.get("stage3_prefetch_bucket_size", default.prefetch)),
        persistent=int(zero.get("stage3_param_persistence_threshold", default.persistent)),
        offload=zero.get("offload_optimizer", {}).get("device", "none") != "none",
        offload_weights=zero.get("offload_param", {}).get("device", "none") != "none",
        bf16=bf16,
    )
