"""A small but real three-level problem, and its exact hypergradient by forward-mode differentiation."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy

from mlomae import objectives
from mlomae.config import Config
from mlomae.data.loader import Batch
from mlomae.distributed.engine import TorchEngine, trainable
from mlomae.levels import HeadLevel, MaskedBatch, MaskLevel, PretrainLevel, parameters_of
from mlomae.models import encoder as encoder_module
from mlomae.models.encoder import pool_features
from mlomae.models.head import ClassifierHead
from mlomae.models.mae import MaskedAutoencoder
from mlomae.models.masking import build_masking_network
from mlomae.models.selection import MaskPolicy

NUM_CLASSES = 10
BATCH = 16


class TensorStream:
    """Batches of one fixed random data set: structured images and labels that depend on them."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype
        self.number = 0

    def next(self) -> Batch:
        coarse = torch.randn(BATCH, 3, 4, 4, generator=self.generator)
        images = torch.nn.functional.interpolate(coarse, size=(16, 16), mode="bilinear")
        images = images + 0.1 * torch.randn(images.shape, generator=self.generator)
        labels = coarse.mean(dim=(1, 2, 3)).mul(12).round().long() % NUM_CLASSES
        self.number += 1
        return Batch(images.to(self.dtype), labels, self.number - 1, 0)


@dataclass
class Problem:
    """Three levels and the batches at which the hypergradient is taken."""

    levels: tuple[PretrainLevel, HeadLevel, MaskLevel]
    masked: MaskedBatch
    train: Batch
    heldout: Batch

    def hypergradient(self) -> list[Tensor]:
        """The gradient that the mask level descends along."""
        pretrain, _, mask = self.levels
        direction = mask.direction(self.train, self.heldout, iteration=0)
        influence, _ = mask.influence(self.masked, direction)
        probability = mask.engine.module(self.masked.tokens).sigmoid()
        loss = objectives.mask_loss(probability, self.masked.selection.mask, influence, pretrain.lr(0))
        return list(torch.autograd.grad(loss, parameters_of(mask.engine.module)))

    def exact(self) -> list[Tensor]:
        """The same by double backward for v and forward mode for the mixed product, in float64."""
        pretrain, head, mask = self.levels
        module = self._double(pretrain.engine.module)
        network = self._double(mask.engine.module)
        classifier = self._double(head.engine.module)
        theta = {name: p.detach() for name, p in trainable(module)}
        phi = {name: p.detach() for name, p in trainable(network)}
        images = self.masked.images.double()
        assert self.masked.tokens is not None
        tokens = self.masked.tokens.double()
        removed = self.masked.selection.mask.double()
        selection = type(self.masked.selection)(
            self.masked.selection.ids_keep, self.masked.selection.ids_restore, removed
        )

        def pretrain_loss(theta: dict[str, Tensor], phi: dict[str, Tensor]) -> Tensor:
            errors = functional_call(module, theta, (images, selection))
            p = functional_call(network, phi, (tokens,)).sigmoid()
            return (removed * p * errors).sum() / removed.sum()

        with sdpa_kernel(SDPBackend.MATH):
            v = self._exact_direction(module, classifier, theta)
            _, product = jvp(lambda t: grad(pretrain_loss, argnums=1)(t, phi), (theta,), (v,))
        return [-pretrain.lr(0) * product[name] for name in phi]

    def _exact_direction(
        self, module: MaskedAutoencoder, classifier: ClassifierHead, theta: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        _, head, mask = self.levels
        leaves = {name: p.clone().requires_grad_() for name, p in theta.items()}
        inside = {name.removeprefix("encoder."): p for name, p in leaves.items() if "encoder." in name}
        pool = mask.pool

        def features(images: Tensor) -> Tensor:
            return pool_features(functional_call(module.encoder, inside, (images.double(),)), pool)

        weights = {name: p.detach().requires_grad_() for name, p in classifier.named_parameters()}
        if mask.levels == 3:
            logits = functional_call(classifier, weights, (features(self.train.images),))
            loss = cross_entropy(logits, self.train.labels)
            grads = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            lr = head.lr(0)
            weights = {n: w - lr * g for (n, w), g in zip(weights.items(), grads, strict=True)}
        logits = functional_call(classifier, weights, (features(self.heldout.images),))
        loss = cross_entropy(logits, self.heldout.labels)
        grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
        return dict(zip(leaves, grads, strict=True))

    @staticmethod
    def _double(module):  # type: ignore[no-untyped-def]  # same type in and out
        import copy

        return copy.deepcopy(module).double()


def build_problem(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, levels: int, steps: int, **sections: dict
) -> Problem:
    """Depth 6, width 128, 64 patches; trained for ``steps`` outer iterations first."""
    monkeypatch.setitem(encoder_module.SIZES, "vit_micro", (128, 6, 4))
    config = Config.model_validate(
        {
            "levels": levels,
            "iterations": 1000,
            "model": dict(arch="vit_micro", img_size=16, patch_size=2, decoder_dim=64,
                          decoder_depth=2, decoder_heads=4),
            "pretrain": dict(batch_size=BATCH, warmup=0.0, lr=1e-3, unroll_steps=1),
            "head": dict(batch_size=BATCH, warmup=0.0, lr=1e-2),
            "mask": dict(batch_size=BATCH, warmup=0.0, lr=1e-3),
            **sections,
        }
    )  # fmt: skip
    torch.manual_seed(0)
    grid = config.model.grid
    module = MaskedAutoencoder(config.model).to(dtype)
    head = ClassifierHead(128, NUM_CLASSES).to(dtype)
    network = build_masking_network(config.masking, grid, 128).to(dtype)
    streams = [TensorStream(seed, dtype) for seed in (1, 2, 3)]
    policy = MaskPolicy(config.masking, grid, config.num_keep, seed=0)
    lower = PretrainLevel(TorchEngine(module, config.pretrain), streams[0], config, policy, network)
    middle = HeadLevel(TorchEngine(head, config.head), streams[1], config.head, config)
    upper = MaskLevel(TorchEngine(network, config.mask), streams[2], config, lower, middle)
    for _ in range(steps):
        masked, _ = lower.step(streams[0].next(), 0)
        train, heldout = streams[1].next(), streams[2].next()
        direction = upper.direction(train, heldout, 0)
        middle.step(direction.train_features, train.labels, 0)
        upper.step(masked, direction, 0)
    masked = lower.mask(streams[0].next())
    return Problem((lower, middle, upper), masked, streams[1].next(), streams[2].next())


def relative_error(approximate: list[Tensor], exact: list[Tensor]) -> float:
    a = torch.cat([t.flatten().double() for t in approximate])
    b = torch.cat([t.flatten().double() for t in exact])
    return float((a - b).norm() / b.norm())
