"""How many numbers the weights of each module hold, from the configuration alone.

Letters: D encoder width, E decoder width, L patches, P values per patch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from mlomae.config import Config
from mlomae.flops import MLP_RATIO
from mlomae.models.encoder import SIZES, num_pooled
from mlomae.sections import ModelConfig


@dataclass(frozen=True)
class Weights:
    """Numbers of one module.

    Attributes:
        tensors: numbers of each trainable tensor.
        frozen: numbers of the tables of positions.
        products: trainable numbers that autocast casts to bf16: matrices and biases of products.
    """

    tensors: tuple[int, ...] = ()
    frozen: int = 0
    products: int = 0

    def __add__(self, other: Weights) -> Weights:
        return Weights(
            self.tensors + other.tensors, self.frozen + other.frozen, self.products + other.products
        )

    def __mul__(self, count: int) -> Weights:
        return Weights(count * self.tensors, count * self.frozen, count * self.products)

    @property
    def trainable(self) -> int:
        return sum(self.tensors)

    @property
    def all(self) -> int:
        return self.trainable + self.frozen


def affine(inputs: int, outputs: int) -> Weights:
    """A product with its bias."""
    return Weights((inputs * outputs, outputs), products=inputs * outputs + outputs)


def norm(width: int) -> Weights:
    """Scale and shift of a layer normalisation."""
    return Weights((width, width))


@functools.cache
def block(width: int) -> Weights:
    """A transformer block."""
    attention = affine(width, 3 * width) + affine(width, width)
    mlp = affine(width, MLP_RATIO * width) + affine(MLP_RATIO * width, width)
    return attention + mlp + norm(width) + norm(width)


def patch_projection(model: ModelConfig) -> Weights:
    return affine(model.patch_size**2 * model.in_chans, SIZES[model.arch][0])


@functools.cache
def encoder(model: ModelConfig) -> Weights:
    width, depth, _ = SIZES[model.arch]
    tokens = Weights((width,), frozen=(1 + model.num_patches) * width)
    return patch_projection(model) + tokens + block(width) * depth + norm(width)


@functools.cache
def decoder(model: ModelConfig) -> Weights:
    width = model.decoder_dim
    tokens = Weights((width,), frozen=(1 + model.num_patches) * width)
    ends = affine(SIZES[model.arch][0], width) + affine(width, model.patch_size**2 * model.in_chans)
    return tokens + block(width) * model.decoder_depth + norm(width) + ends


def head(config: Config, num_classes: int) -> Weights:
    model, width = config.model, SIZES[config.model.arch][0]
    return affine(width if config.data.has_label_maps else num_pooled(width, model.pool), num_classes)


def label_classifier(config: Config, num_classes: int) -> Weights:
    """Of ``pretrain.label_weight``; nothing where that is 0."""
    return affine(SIZES[config.model.arch][0], num_classes) if config.pretrain.label_weight else Weights()


def masking_network(config: Config) -> Weights:
    patches, hidden = config.model.num_patches, config.masking.hidden
    width = SIZES[config.model.arch][0]
    if config.masking.network == "mlp":
        return affine(patches * width, hidden) + affine(hidden, patches)
    neighbours, score = affine(9, hidden), Weights((hidden,), patches * hidden, hidden)
    return affine(width, hidden) + neighbours + affine(hidden, hidden) + score
