"""What a pass through the networks keeps in memory, layer by layer, as eager PyTorch runs them.

Every number here is one of two kinds. The stream between blocks (and what normalisations return) is float32
in any precision: R = 4 bytes a number. Results of products are A = 4 bytes in float32 and 2 under bf16
autocast. Per token and channel a transformer block keeps for its backward pass

============================ ====== ===== ===========================================================
tensor                       plain  lean  why
============================ ====== ===== ===========================================================
input                        R      R     of the first normalisation
normalised input             A            of the product to queries, keys and values
queries, keys, values        3 A    3 A   of attention
mixed values                 A      A     of attention and of the projection
input of the MLP             R      R     of the second normalisation
normalised                   A            of the first product
hidden                       4 A    4 A   of GELU
GELU of hidden               4 A          of the second product
============================ ====== ===== ===========================================================

which in float32 are 16 and 10 numbers. Autocast adds the bf16 copies of weights.
Letters: D width, K kept patches, L patches.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mlomae.config import Config
from mlomae.models.encoder import SIZES
from mlomae.planning import parameters
from mlomae.planning.parameters import Weights

FLOAT32 = 4
BF16 = 2


@dataclass(frozen=True)
class Layer:
    """A stretch of a pass; all in bytes.

    Attributes:
        kept: what its forward pass leaves for the backward pass.
        gradients: what its backward pass leaves: gradients of its weights.
        forward: further bytes at the worst moment of its forward pass.
        backward: the same of its backward pass, without ``gradients``.
        weights: its weights as ZeRO 3 gathers them while the layer runs.
    """

    kept: int
    gradients: int
    forward: int
    backward: int
    weights: int


def peak(layers: Sequence[Layer], gradients: bool = True) -> tuple[int, int]:
    """Bytes at the worst moment of a forward and a backward pass: of activations, and of gradients.

    Args:
        gradients: whether the gradients of the weights pile up until the end.
    """
    before = list(itertools.accumulate(layer.kept for layer in layers))
    later = list(itertools.accumulate(layer.gradients for layer in reversed(layers)))[::-1]
    moments = [(kept + layer.forward, 0) for kept, layer in zip(before, layers, strict=True)]
    for kept, layer, made in zip(before, layers, later, strict=True):
        moments.append((kept + layer.backward, made if gradients else layer.gradients))
    return max(moments, key=sum)


@dataclass(frozen=True)
class Passes:
    """The passes of one rank.

    Attributes:
        config: of the run.
        product: bytes of a number that a product returns.
    """

    config: Config
    product: int

    def pretrain(self, images: int) -> list[Layer]:
        """The autoencoder on the kept patches of ``images`` images."""
        config, model = self.config, self.config.model
        width, depth, heads = SIZES[model.arch]
        kept, patches = 1 + config.num_keep, model.num_patches
        layers = [self._embedding(images, kept)]
        layers += self._blocks(depth, images * kept, width, heads)
        layers.append(self._bridge(images, kept))
        every, last = images * (1 + patches), images * (patches - (model.predict == "removed") * (kept - 1))
        dim = model.decoder_dim
        layers += self._blocks(model.decoder_depth - 1, every, dim, model.decoder_heads)
        return [*layers, self._last_decoder_block(every, last), self._prediction(last)]

    def features(self, images: int) -> list[Layer]:
        """The encoder on whole images, as the direction of the hypergradient differentiates it."""
        model = self.config.model
        width, depth, heads = SIZES[model.arch]
        tokens = images * (1 + model.num_patches)
        layers = [self._embedding(images, 1 + model.num_patches)]
        layers += self._blocks(depth - 1, tokens, width, heads, lean=True)
        r, a = FLOAT32 * tokens * width, self.product * tokens * width
        if model.pool != "cls" or self.config.data.has_label_maps:
            # The last block is never recomputed as a whole. Behind it, the normalised tokens are averaged.
            layers.append(self._block(tokens, width, heads, lean=True))
            return [*layers, Layer(2 * r, FLOAT32 * 2 * width, 0, 2 * r, FLOAT32 * 2 * width)]
        # One token goes on; queries, keys and values of all are there, and the gradients of each, filled up
        # with zeros, before they are packed.
        weights = parameters.block(width) + parameters.norm(width)
        return [*layers, Layer(r + 3 * a + self._cast(weights), *self._of(weights, a, 4 * a + r))]

    def evaluation(self, images: int, product: int) -> int:
        """Most bytes of a forward pass of the autoencoder that keeps nothing.

        Args:
            product: as in the class; finite differences leave autocast.
        """
        model = self.config.model
        width, _, _ = SIZES[model.arch]
        kept, every = images * (1 + self.config.num_keep), images * (1 + model.num_patches)
        # In the MLP: the stream before and after attention, the normalised one, hidden numbers, GELU of them.
        worst = max(
            (3 * FLOAT32 + 8 * product) * tokens * dim
            for tokens, dim in ((kept, width), (every, model.decoder_dim))
        )
        latent = FLOAT32 * kept * width
        return max(worst + latent, FLOAT32 * 2 * images * model.num_patches * width)

    def tangents(self, images: int, product: int) -> int:
        """The same of a forward pass that carries a tangent beside every activation."""
        model = self.config.model
        width, _, heads = SIZES[model.arch]
        kept, every = images * (1 + self.config.num_keep), images * (1 + model.num_patches)
        worst = 0
        for tokens, dim, num_heads in ((kept, width, heads), (every, model.decoder_dim, model.decoder_heads)):
            mlp = (6 * FLOAT32 + 24 * product) * tokens * dim
            # Attention by its formula: logits and their tangent, in float32 too where they are narrower;
            # exponentials, shares and the product of shares and tangent.
            shares = (5 * FLOAT32 + (2 * product if product < FLOAT32 else 0)) * num_heads * tokens**2
            attention = (4 * FLOAT32 + 4 * product) * tokens * dim + shares // images
            worst = max(worst, mlp, attention)
        return worst + 2 * FLOAT32 * kept * width

    def pooled(self, images: int) -> int:
        """The same of the encoder on whole images."""
        width, _, _ = SIZES[self.config.model.arch]
        tokens = images * (1 + self.config.model.num_patches)
        return (3 * FLOAT32 + 8 * self.product) * tokens * width

    def masking(self, images: int) -> int:
        """Most bytes while the masking network scores ``images`` images; in float32."""
        model = self.config.model
        patches = images * model.num_patches
        tokens, hidden = patches * SIZES[model.arch][0], self._hidden(images)
        # The patches as they are, normalised, and scaled for the first product.
        return FLOAT32 * (3 * tokens + hidden)

    def masking_step(self, images: int) -> int:
        """The same of a step of the masking network; the patches are there already."""
        tokens = images * self.config.model.num_patches * SIZES[self.config.model.arch][0]
        weights = parameters.masking_network(self.config).trainable
        return FLOAT32 * (2 * tokens + 6 * self._hidden(images) + weights)

    def _hidden(self, images: int) -> int:
        network = self.config.masking
        return images * network.hidden * (self.config.model.num_patches if network.network == "token" else 1)

    def _embedding(self, images: int, tokens: int) -> Layer:
        """Projection of all patches and the choice of some: the projected ones live for a moment only."""
        model = self.config.model
        width = SIZES[model.arch][0]
        pixels = images * model.in_chans * model.size[0] * model.size[1]
        patches = images * model.num_patches * width
        narrow = self.product < FLOAT32
        kept = BF16 * pixels if narrow else 0
        weights = parameters.patch_projection(model) + Weights((width,))
        forward = (self.product + FLOAT32 * narrow) * patches + FLOAT32 * images * tokens * width
        backward = FLOAT32 * images * tokens * width + (FLOAT32 + self.product * narrow) * patches
        return Layer(kept + self._cast(weights), *self._of(weights, forward, backward))

    def _blocks(self, count: int, tokens: int, width: int, heads: int, lean: bool = False) -> list[Layer]:
        layer = self._block(tokens, width, heads, lean)
        if self.config.compute.activation_checkpointing:
            # The input is kept. Everything else is there again in the block's own backward pass.
            kept = FLOAT32 * tokens * width
            layer = replace(layer, kept=kept, backward=layer.kept - kept + layer.backward)
            if not lean:
                layer = replace(layer, forward=(2 * FLOAT32 + 8 * self.product) * tokens * width)
        return [layer] * count

    def _block(self, tokens: int, width: int, heads: int, lean: bool = False) -> Layer:
        r, a = FLOAT32 * tokens * width, self.product * tokens * width
        narrow = a if self.product < FLOAT32 else 0
        statistics = FLOAT32 * tokens * heads
        weights = parameters.block(width)
        if lean:
            # GELU is computed again and its gradient twice; autocast casts the incoming gradient.
            kept = 2 * r + 8 * a + statistics
            return Layer(kept, *self._of(weights, 8 * a, r + 8 * a + 2 * narrow))
        kept = 2 * r + 14 * a + statistics + 4 * FLOAT32 * tokens + self._cast(weights)
        return Layer(kept, *self._of(weights, r + a, r + 4 * a + narrow))

    def _bridge(self, images: int, kept: int) -> Layer:
        """The encoder's normalisation, the embedding, and the decoder's tokens in their places."""
        model = self.config.model
        width, dim = SIZES[model.arch][0], model.decoder_dim
        tokens = images * kept
        weights = parameters.norm(width) + parameters.affine(width, dim) + Weights((dim,))
        saved = (FLOAT32 + self.product) * tokens * width + self._cast(weights)
        stream = FLOAT32 * images * (1 + model.num_patches) * dim
        return Layer(saved, *self._of(weights, stream, stream + FLOAT32 * tokens * (width + dim)))

    def _last_decoder_block(self, every: int, last: int) -> Layer:
        """All tokens attend; behind attention, the predicted patches go on."""
        model = self.config.model
        width, dim = self.product * model.decoder_dim, FLOAT32 * model.decoder_dim
        weights = parameters.block(model.decoder_dim)
        attention = every * (dim + 5 * width + FLOAT32 * model.decoder_heads)
        mlp = last * (dim + 9 * width)
        narrow = last * width if self.product < FLOAT32 else 0
        kept = attention + mlp + self._cast(weights)
        return Layer(kept, *self._of(weights, last * (dim + width), last * (dim + 4 * width) + narrow))

    def _prediction(self, last: int) -> Layer:
        """The last normalisation, the predicted pixels, and the loss, which keeps them."""
        model = self.config.model
        dim, values = model.decoder_dim, model.patch_size**2 * model.in_chans
        weights = parameters.norm(dim) + parameters.affine(dim, values)
        saved = last * ((FLOAT32 + self.product) * dim + self.product * values) + self._cast(weights)
        return Layer(saved, *self._of(weights, 0, self.product * last * (values + dim)))

    def _cast(self, weights: Weights) -> int:
        """bf16 copies that autocast makes and the backward pass keeps."""
        return BF16 * weights.products if self.product < FLOAT32 else 0

    def _of(self, weights: Weights, forward: int, backward: int) -> tuple[int, int, int, int]:
        size = FLOAT32 * weights.trainable
        return size, forward, backward, size
