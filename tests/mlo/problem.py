"""A small but real three-level problem, and its exact hypergradient by forward-mode differentiation."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from mlomae import objectives
from mlomae.config import Config
from mlomae.data.batches import Batch
from mlomae.distributed.engine import TorchEngine, trainable
from mlomae.hypergrad_check import mask_gradient
from mlomae.hypergradient import MaskedBatch
from mlomae.levels import HeadLevel, MaskLevel, PretrainLevel
from mlomae.models import encoder as encoder_module
from mlomae.models.encoder import pool_features
from mlomae.models.head import ClassifierHead
from mlomae.models.mae import MaskedAutoencoder
from mlomae.models.masking import build_masking_network
from mlomae.models.selection import MaskPolicy

NUM_CLASSES = 10
BATCH = 4
EMBED_DIM, DEPTH, NUM_HEADS = 128, 6, 4
ITERATION = 0
"""The outer iteration whose learning rates are used; without warm-up they are the highest ones."""

Module = TypeVar("Module", bound=nn.Module)
Named = dict[str, Tensor]


class TensorStream:
    """An endless stream of structured random images with labels that depend on them."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.number = 0

    def next(self) -> Batch:
        coarse = torch.randn(BATCH, 3, 4, 4, generator=self.generator)
        images = torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear")
        images = images + 0.1 * torch.randn(images.shape, generator=self.generator)
        labels = coarse.mean(dim=(1, 2, 3)).mul(12).round().long() % NUM_CLASSES
        self.number += 1
        return Batch(images, labels, self.number - 1, 0)


@dataclass
class Problem:
    """Three levels and the batches at which the hypergradient is taken."""

    config: Config
    pretrain: PretrainLevel
    head: HeadLevel
    mask: MaskLevel
    masked: MaskedBatch
    train: Batch
    heldout: Batch

    def converted(self, dtype: torch.dtype, mixed: bool = False, **changes: Any) -> Problem:
        """The same weights and batches in another precision; ``changes`` are sections of the recipe."""
        config = Config.model_validate(_merge(self.config.model_dump(), changes))
        modules = [copy.deepcopy(level.engine.module).to(dtype) for level in self._levels]
        lower, middle, upper = _levels_of(config, *modules, mixed=mixed)
        assert self.masked.tokens is not None and self.masked.scores is not None
        masked = MaskedBatch(
            self.masked.images.to(dtype),
            self.masked.selection,
            self.masked.tokens.to(dtype),
            self.masked.scores.to(dtype),
        )
        train, heldout = (replace(b, images=b.images.to(dtype)) for b in (self.train, self.heldout))
        return Problem(config, lower, middle, upper, masked, train, heldout)

    def hypergradient(self) -> Tensor:
        """The gradient that the mask level descends along, flat."""
        hypergradient = self.mask.hypergradient
        direction = hypergradient.direction(self.train, self.heldout, ITERATION)
        influence, _ = hypergradient.influence(self.masked, direction)
        return self.pretrain.lr(ITERATION) * mask_gradient(self.network, self.masked, influence)

    @cached_property
    def exact(self) -> Tensor:
        """The same by double backward for v and forward mode for the mixed product, in float64.

        Taken at the present weights: read it before anything moves them.
        """
        module, network = _double(self.autoencoder), _double(self.network)
        assert self.masked.tokens is not None
        images, tokens = self.masked.images.double(), self.masked.tokens.double()
        theta, phi = detached(module), detached(network)

        def pretrain_loss(theta: Named, phi: Named) -> Tensor:
            errors = functional_call(module, theta, (images, self.masked.selection))
            p = functional_call(network, phi, (tokens,)).sigmoid()
            return objectives.pretrain_loss(errors, self.masked.selection.mask.double(), p)

        # Fused attention has no forward-mode derivative.
        with sdpa_kernel(SDPBackend.MATH):
            v = self.exact_direction()
            product = jvp(lambda t: grad(pretrain_loss, argnums=1)(t, phi), (theta,), (v,))[1]
        return flat([-self.pretrain.lr(ITERATION) * product[name] for name in phi])

    def exact_direction(self) -> Named:
        """d L_val / d theta by name, through every path at once, in float64."""
        module = _double(self.autoencoder)
        leaves = {name: p.requires_grad_() for name, p in detached(module).items()}
        grads = torch.autograd.grad(
            self.heldout_loss(module, leaves), list(leaves.values()), allow_unused=True
        )
        return {
            name: torch.zeros_like(leaf) if g is None else g
            for (name, leaf), g in zip(leaves.items(), grads, strict=True)
        }

    def heldout_loss(self, module: MaskedAutoencoder, theta: Named) -> Tensor:
        """L_val(theta, w') in float64, where w' is the head after its look-ahead step (levels 3) or w."""
        prefix = "encoder."
        inside = {name.removeprefix(prefix): p for name, p in theta.items() if name.startswith(prefix)}
        head = _double(self.head.engine.module)
        weights = {name: p.requires_grad_() for name, p in detached(head).items()}

        def loss(batch: Batch, weights: Named) -> Tensor:
            assert batch.labels is not None
            tokens = functional_call(module.encoder, inside, (batch.images.double(),))
            logits = functional_call(head, weights, (pool_features(tokens, self.config.model.pool),))
            return objectives.head_loss(logits, batch.labels)

        if self.config.levels == 3:
            grads = torch.autograd.grad(loss(self.train, weights), list(weights.values()), create_graph=True)
            lr = self.head.lr(ITERATION)
            weights = {name: w - lr * g for (name, w), g in zip(weights.items(), grads, strict=True)}
        return loss(self.heldout, weights)

    @property
    def autoencoder(self) -> MaskedAutoencoder:
        return self.pretrain.autoencoder

    @property
    def network(self) -> nn.Module:
        return self.mask.engine.module

    @property
    def _levels(self) -> tuple[PretrainLevel, HeadLevel, MaskLevel]:
        return self.pretrain, self.head, self.mask

    def weights(self) -> list[Tensor]:
        """Copies of every tensor of the three modules, to compare bit for bit."""
        return [t.clone() for level in self._levels for t in level.engine.module.state_dict().values()]


def build_problem(steps: int, **changes: Any) -> Problem:
    """Depth 6, width 128, 64 patches, float32; first trained for ``steps`` outer iterations."""
    base = {
        "iterations": 1000,
        "model": dict(arch="vit_micro", img_size=16, patch_size=2,
                      decoder_dim=64, decoder_depth=2, decoder_heads=4),
        "pretrain": dict(batch_size=BATCH, warmup=0.0, lr=1e-3, unroll_steps=1),
        "head": dict(batch_size=BATCH, warmup=0.0, lr=1e-2),
        "mask": dict(batch_size=BATCH, warmup=0.0, lr=1e-3),
    }  # fmt: skip
    config = Config.model_validate(_merge(base, changes))
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        patch.setitem(encoder_module.SIZES, "vit_micro", (EMBED_DIM, DEPTH, NUM_HEADS))
        torch.manual_seed(0)
        module = MaskedAutoencoder(config.model)
        head = ClassifierHead(EMBED_DIM, NUM_CLASSES)
        network = build_masking_network(config.masking, config.model.grid, EMBED_DIM)
    lower, middle, upper = _levels_of(config, module, head, network)
    streams = [TensorStream(seed) for seed in (1, 2, 3)]
    for _ in range(steps):
        masked, _ = lower.step(streams[0].next(), ITERATION, record=True)
        train, heldout = streams[1].next(), streams[2].next()
        direction = upper.hypergradient.direction(train, heldout, ITERATION)
        assert train.labels is not None
        middle.step(direction.train_features, train.labels, ITERATION)
        upper.step(masked, direction, ITERATION)
    masked = lower.mask(streams[0].next())
    return Problem(config, lower, middle, upper, masked, streams[1].next(), streams[2].next())


def _levels_of(
    config: Config, module: nn.Module, head: nn.Module, network: Any, mixed: bool = False
) -> tuple[PretrainLevel, HeadLevel, MaskLevel]:
    policy = MaskPolicy(config.masking, config.model.grid, config.num_keep, seed=0)
    unused: Any = None  # the tests hand batches to the levels themselves
    lower = PretrainLevel(TorchEngine(module, config.pretrain, mixed), unused, config, policy, network)
    middle = HeadLevel(TorchEngine(head, config.head), unused, config)
    upper = MaskLevel(TorchEngine(network, config.mask), unused, config, lower, middle)
    return lower, middle, upper


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    """Distance of two vectors divided by the length of the exact one."""
    return float((approximate.double() - exact).norm() / exact.norm())


def flat(tensors: Any) -> Tensor:
    """Tensors one after another as a vector."""
    return torch.cat([tensor.flatten() for tensor in tensors])


def detached(module: nn.Module) -> Named:
    """The trainable parameters by name, without graph, as copies."""
    return {name: p.detach().clone() for name, p in trainable(module)}


def _double(module: Module) -> Module:
    return copy.deepcopy(module).double()


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """``changes`` laid over ``base``, section by section."""
    merged = dict(base)
    for key, value in changes.items():
        merged[key] = {**base.get(key, {}), **value} if isinstance(value, dict) else value
    return merged


def parameters_of(module: nn.Module) -> list[Tensor]:
    """The trainable parameters, in module order."""
    return [parameter for _, parameter in trainable(module)]
