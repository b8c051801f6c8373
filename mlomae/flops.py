"""Floating-point operations that a run's arithmetic needs, from its configuration alone.

*Model* FLOPs: what the method asks for, however it is executed. A multiplication with its addition counts 2;
matrix products, attention and convolutions count, everything else (normalisation, activations, losses, the
optimizers) is left out; nothing that is recomputed counts twice. What differentiation makes of a product:

================================== ======= ========= ======================================================
pass                               linear  attention why
================================== ======= ========= ======================================================
forward                            1       1
forward and backward               3       3         a gradient for each of the two factors
forward mode, weights that move    3       3         a tangent for each of the two factors
forward mode, constant weights     2       3         a tangent for the activations only
double backward, weights that move 5       5         both gradients, and the derivative of each
double backward, constant weights  3       5         one gradient, and its derivative
================================== ======= ========= ======================================================

A product at the input (patch projection, first layer of the masking network) lacks the gradient, and the
tangent, of its input. Letters: L patches, K kept patches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mlomae.config import Config
from mlomae.models.encoder import SIZES, num_pooled
from mlomae.sections import ModelConfig

MLP_RATIO = 4
"""Hidden width of a block's MLP over the block's width (He et al. 2022), of encoder and decoder."""
_NEIGHBOURHOOD = 9


@dataclass(frozen=True)
class Products:
    """FLOPs of the products in one forward pass over one image, by what differentiation makes of them.

    Attributes:
        linear: activations times weights.
        attention: activations times activations: queries with keys, and shares with values.
        first: inputs times weights; nobody asks for a derivative in the input.
    """

    linear: int = 0
    attention: int = 0
    first: int = 0

    def __add__(self, other: Products) -> Products:
        return Products(
            self.linear + other.linear, self.attention + other.attention, self.first + other.first
        )

    def times(self, linear: int, attention: int, first: int) -> int:
        """FLOPs where each kind of product is taken this many times."""
        return linear * self.linear + attention * self.attention + first * self.first

    @property
    def forward(self) -> int:
        """FLOPs without any derivative."""
        return self.times(1, 1, 1)

    @property
    def training(self) -> int:
        """FLOPs of the forward and the backward pass, all weights trainable."""
        return self.times(3, 3, 2)

    @property
    def moving_tangent(self) -> int:
        """FLOPs of a forward-mode pass along which the weights move."""
        return self.times(3, 3, 2)

    @property
    def constant_tangent(self) -> int:
        """FLOPs of a forward-mode pass whose input moves and whose weights do not."""
        return self.times(2, 3, 1)

    @property
    def moving_double_backward(self) -> int:
        """FLOPs of the derivative, in the cotangent, of the gradients of weights and inputs."""
        return self.times(5, 5, 3)

    @property
    def constant_double_backward(self) -> int:
        """The same where only the input has a gradient."""
        return self.times(3, 5, 1)


def pretrain_flops(config: Config, num_classes: int = 0) -> int:
    """FLOPs of one image in one pretrain step, forward and backward; no masking network."""
    return pretrain_pass(config, num_classes).training


def pretrain_pass(config: Config, num_classes: int) -> Products:
    """The autoencoder on one image, and its classifier where ``pretrain.label_weight`` asks for one."""
    classifier = Products(linear=2 * SIZES[config.model.arch][0] * num_classes)
    return (
        masked_encoder(config)
        + decoder(config)
        + (classifier if config.pretrain.label_weight else Products())
    )


def iteration_flops(config: Config, num_classes: int = 0, estimator: str | None = None) -> dict[str, float]:
    """FLOPs of an average outer iteration for the global batch, by part.

    Divide by the number of ranks for the FLOPs of one. Parts of the hypergradient are weighted by
    1 / ``hypergradient.every``.

    Args:
        num_classes: of head and classifier; 0 leaves them out, which are small beside the encoder.
        estimator: of the influence, as ``Hypergradient.estimator`` resolves ``auto``, which depends on the
            precision; None takes the configured one, and ``auto`` for ``fd``.

    Returns:
        ``pretrain``: the steps of the autoencoder. Where there is a masking network:
        ``masking``: patch projection and masking network in each of these steps.
        ``mask``: forward and backward pass of the masking network. Where a hypergradient trains it:
        ``direction``: the encoder on the train and held-out batches, and back.
        ``influence``: of ``hypergradient.share`` of a pretrain batch. A check of the radius takes two more
        differences; the search that may follow, if the radius turns out wrong, is not counted.
        ``features``: the encoder on the train batch in iterations without hypergradient.
        ``head``: the head's step and its answer in the hypergradient. Of ``best_response: implicit`` this
        holds the derivatives at the optimum only: how many steps lead there depends on the data.
    """
    pretrain_images = config.pretrain.unroll_steps * config.pretrain.batch_size
    parts = {"pretrain": float(pretrain_images * pretrain_flops(config, num_classes))}
    if not config.masking.scored:
        return parts
    network = masking_network(config)
    parts["masking"] = float(pretrain_images * (patch_projection(config.model) + network).forward)
    if not config.masking.learns:
        return {**parts, "mask": float(config.pretrain.batch_size * network.training)}
    due = 1 / config.hypergradient.every
    train, heldout = config.head.batch_size, config.mask.batch_size
    answers = config.levels == 3
    # A head for pixels reads all patches.
    pool = "patches" if config.data.has_label_maps else config.model.pool
    encoder = whole_encoder(config.model, pool)
    masked_images = math.ceil(config.hypergradient.share * config.pretrain.batch_size)
    direction = heldout * encoder.training + train * (encoder.training if answers else encoder.forward)
    return {
        **parts,
        "direction": due * direction,
        "influence": due * masked_images * _influence(config, estimator),
        "features": (1 - due) * train * encoder.forward,
        "head": _head(config, num_classes, answers, due),
        "mask": due * masked_images * network.training,
    }


def patch_projection(model: ModelConfig) -> Products:
    """The projection of all L patches to the encoder's width."""
    width, _, _ = SIZES[model.arch]
    return Products(first=2 * model.num_patches * model.patch_size**2 * model.in_chans * width)


def masked_encoder(config: Config) -> Products:
    """The encoder on the class token and the K kept patches; all patches are projected."""
    width, depth, _ = SIZES[config.model.arch]
    return patch_projection(config.model) + _blocks(depth, 1 + config.num_keep, width)


def whole_encoder(model: ModelConfig, pool: str) -> Products:
    """The encoder on the class token and all L patches, as ``pool`` reads it."""
    width, depth, _ = SIZES[model.arch]
    tokens = 1 + model.num_patches
    if pool != "cls":
        return patch_projection(model) + _blocks(depth, tokens, width)
    # Behind the packed projection of its queries, keys and values, the last block has one token left.
    last = _block(width, tokens, tokens, queries=1, outputs=1)
    return patch_projection(model) + _blocks(depth - 1, tokens, width) + last


def decoder(config: Config) -> Products:
    """The decoder on the class token and all L patches; behind its last attention on the predicted ones."""
    model = config.model
    width, tokens = model.decoder_dim, 1 + model.num_patches
    outputs = model.num_patches - (config.num_keep if model.predict == "removed" else 0)
    embed = Products(linear=2 * (1 + config.num_keep) * SIZES[model.arch][0] * width)
    last = _block(width, tokens, tokens, queries=tokens, outputs=outputs)
    prediction = Products(linear=2 * outputs * width * model.patch_size**2 * model.in_chans)
    return embed + _blocks(model.decoder_depth - 1, tokens, width) + last + prediction


def masking_network(config: Config) -> Products:
    """The masking network on the projected patches, which have no gradient."""
    patches, hidden = config.model.num_patches, config.masking.hidden
    first = 2 * patches * SIZES[config.model.arch][0] * hidden
    if config.masking.network == "mlp":
        return Products(linear=2 * hidden * patches, first=first)
    neighbours, context, score = _NEIGHBOURHOOD * patches * hidden, hidden**2, patches * hidden
    return Products(linear=2 * (neighbours + context + score), first=first)


def _blocks(depth: int, tokens: int, width: int) -> Products:
    """Transformer blocks that compute all their tokens."""
    block = _block(width, tokens, tokens, tokens, tokens)
    return Products(depth * block.linear, depth * block.attention)


def _block(width: int, tokens: int, keys: int, queries: int, outputs: int) -> Products:
    """One transformer block.

    Args:
        tokens: that are projected to queries, keys and values.
        keys: tokens that are attended to.
        queries: tokens that attend, and are projected afterwards.
        outputs: tokens that go through the MLP.
    """
    per_token = tokens * 3 + queries + outputs * 2 * MLP_RATIO
    return Products(linear=2 * per_token * width**2, attention=2 * 2 * queries * keys * width)


def _influence(config: Config, estimator: str | None) -> float:
    """FLOPs of one image's influence; v moves the encoder only."""
    settings = config.hypergradient
    name = settings.estimator if estimator is None else estimator
    encoder, rest = masked_encoder(config), decoder(config)
    if name == "jvp":
        return encoder.moving_tangent + rest.constant_tangent
    if name == "exact":
        return encoder.moving_double_backward + rest.constant_double_backward
    # A one-sided difference reuses the pretrain step's own errors where it has the same precision.
    passes = 1 if name == "fd-forward" and settings.precision != "float32" else 2
    differences = 1 + (2 / settings.check_every if settings.check_every else 0)
    return passes * differences * (encoder + rest).forward


def _head(config: Config, num_classes: int, answers: bool, due: float) -> float:
    """FLOPs of the linear classifier: its own step, and its answer where a hypergradient is due."""
    model, width = config.model, SIZES[config.model.arch][0]
    # Of an image, or of each of its patches; upsampling is left out.
    inputs = width * model.num_patches if config.data.has_label_maps else num_pooled(width, model.pool)
    product = 2 * inputs * num_classes
    train, heldout = config.head.batch_size, config.mask.batch_size
    # Its step takes two products, since the features are constant. Its answer differentiates the held-out
    # loss in the features and, where the head moves, in its weights too; the look-ahead step and its mixed
    # derivative in the train features take five more on the train batch.
    answer = heldout * 3 + train * 5 if answers else heldout * 2
    return float(product * (train * 2 + due * answer))
