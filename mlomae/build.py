"""From a configuration to the levels."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import mlomae_kernels
from mlomae.compilation import compile_module
from mlomae.config import Config
from mlomae.data.loader import LevelLoaders
from mlomae.data.stream import Stream
from mlomae.distributed.deepspeed_engine import DeepSpeedEngine
from mlomae.distributed.engine import Engine, TorchEngine
from mlomae.distributed.env import World
from mlomae.errors import UserError
from mlomae.interop.starting import start_from
from mlomae.levels import HardnessLevel, HeadLevel, Level, MaskLevel, PretrainLevel, ReadingLevel
from mlomae.models.encoder import SIZES, num_pooled
from mlomae.models.head import ClassifierHead, SegmentationHead
from mlomae.models.mae import MaskedAutoencoder
from mlomae.models.masking import build_masking_network
from mlomae.models.selection import MaskPolicy
from mlomae.precision import (
    describe_precision,
    set_float32_products,
    with_precision,
)
from mlomae.random import stream_seed
from mlomae.sections import LevelConfig
from mlomae_kernels.ops.attention import choose_attention


@dataclass(frozen=True)
class Levels:
    """The levels of a run.

    Attributes:
        head, mask: None for policies that do not learn from a hypergradient.
        hardness: None for policies other than ``hard``.
    """

    pretrain: PretrainLevel
    head: HeadLevel | None = None
    mask: MaskLevel | None = None
    hardness: HardnessLevel | None = None

    def by_name(self) -> dict[str, Level[Any]]:
        named = {"pretrain": self.pretrain, "head": self.head, "mask": self.mask, "hardness": self.hardness}
        return {name: level for name, level in named.items() if level is not None}

    def streams(self) -> dict[str, Stream]:
        """By the names of the levels that have one."""
        return {n: level.stream for n, level in self.by_name().items() if isinstance(level, ReadingLevel)}

    @property
    def skipped_steps(self) -> Tensor | int:
        """Of all engines, since this process has begun."""
        return sum(level.engine.skipped_steps for level in self.by_name().values())

    @property
    def scorer(self) -> Level[Any] | None:
        """The level that trains the masking network; None without one."""
        return self.hardness if self.mask is None else self.mask


def build_levels(
    config: Config,
    loaders: LevelLoaders,
    world: World,
    ds_config: dict[str, Any] | None,
    precision: str,
    execution: str,
) -> Levels:
    """Models with seeded weights, their engines, and the levels around them.

    Args:
        ds_config: a checked DeepSpeed configuration, or None for plain torch engines.
        precision: bf16, tf32 or float32.
        execution: eager, compiled or graphs.

    Raises:
        UserError: ``pretrain.micro_batches`` does not divide a rank's batch.
    """
    set_float32_products(precision)
    share, parts = config.pretrain.batch_size // world.size, config.pretrain.micro_batches
    if share % parts:
        raise UserError(f"pretrain.micro_batches: {parts} does not divide a rank's batch of {share} images")

    def engine(module: nn.Module, rates: LevelConfig, micro_batches: int = 1) -> Engine:
        module.to(world.device)
        compile_module(module, execution)
        if ds_config is None:
            return TorchEngine(module, rates, precision == "bf16", micro_batches)
        return DeepSpeedEngine(module, rates, with_precision(ds_config, precision), world, micro_batches)

    model, grid = config.model, config.model.grid
    # One generator state per module: the autoencoder starts from the same weights under every policy.
    torch.manual_seed(stream_seed(config.seed, "init", "pretrain"))
    autoencoder = MaskedAutoencoder(model, loaders.num_classes if config.pretrain.label_weight else None)
    if model.weights is not None:
        started = start_from(autoencoder, model)
        if world.primary:  # beside the output of commands, which may be JSON
            print(started, file=sys.stderr, flush=True)
    autoencoder.set_activation_checkpointing(config.compute.activation_checkpointing)
    # The direction is a gradient through these features and outlives the head's step, whose replay of a CUDA
    # graph would take the memory back.
    compile_module(autoencoder.encoder, "compiled" if execution == "graphs" else execution)
    embed_dim = autoencoder.encoder.embed_dim
    steps = config.iterations * config.pretrain.unroll_steps
    policy = MaskPolicy(config.masking, grid, config.num_keep, config.seed, steps)
    network = None
    if config.masking.scored:
        torch.manual_seed(stream_seed(config.seed, "init", "mask"))
        network = build_masking_network(config.masking, grid, embed_dim)
    lower = PretrainLevel(
        engine(autoencoder, config.pretrain, parts), loaders.pretrain, config, policy, network
    )
    if network is None:
        return Levels(lower)
    if not config.masking.learns:
        return Levels(lower, hardness=HardnessLevel(engine(network, config.mask), config))

    assert loaders.num_classes is not None and loaders.head is not None and loaders.mask is not None
    torch.manual_seed(stream_seed(config.seed, "init", "head"))
    classifier: nn.Module
    if loaders.has_label_maps:
        classifier = SegmentationHead(embed_dim, loaders.num_classes, grid, model.size)
    else:
        classifier = ClassifierHead(num_pooled(embed_dim, model.pool), loaders.num_classes)
    middle = HeadLevel(engine(classifier, config.head), loaders.head, config)
    upper = MaskLevel(engine(network, config.mask), loaders.mask, config, lower, middle)
    return Levels(lower, middle, upper)


def describe_implementations(config: Config, world: World, precision: str, execution: str) -> str:
    """Which implementations of the operators and of attention a run uses, and why, in one line.

    Raises:
        UserError: flash attention is asked for and cannot be had.
    """
    device_type = world.device.type
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    embed_dim, _, num_heads = SIZES[config.model.arch]
    try:
        choice = choose_attention(config.model.attention, world.device, dtype, embed_dim // num_heads)
    except ValueError as error:
        raise UserError(f"model.attention: {error}") from None
    operators = mlomae_kernels.describe(device_type)
    return (
        f"operators: {operators}; attention: {choice.name} ({choice.reason}); "
        f"precision: {describe_precision(precision, world.device)}; execution: {execution}"
    )
