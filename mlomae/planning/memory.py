"""Memory of one rank, phase by phase: what an outer iteration holds at its worst moments.

An outer iteration holds the most either in a pretrain step (kept patches and decoder), in the direction of
the hypergradient (whole images of two batches), in the influence (copies of the weights), or in the steps of
the small networks, where ZeRO's buffers are the largest. Policy hard has pairs of patches instead.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from mlomae.config import Config
from mlomae.errors import UserError
from mlomae.models.encoder import SIZES
from mlomae.planning import parameters
from mlomae.planning.activations import BF16, FLOAT32, Passes, peak
from mlomae.planning.parameters import Weights
from mlomae.planning.sharding import Sharding

GIB = 2**30
# Copies of the number of each pair of patches that the loss of policy hard holds at once; measured.
PAIR_COPIES = 5
# Assumptions about a GPU, not derived from the code: CUDA's context with the libraries' kernels and
# workspaces, NCCL's buffers, and what the allocator can not use of what it has reserved.
CONTEXT_BYTES, NCCL_BYTES, LOST_SHARE = GIB, GIB // 2, 0.05


@dataclass(frozen=True)
class Phase:
    """A worst moment.

    Attributes:
        name: of the part of the outer iteration.
        parts: bytes by what they are for; without the runtime.
    """

    name: str
    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())

    @property
    def beyond(self) -> int:
        """Without what lives between iterations."""
        return self.total - sum(self.parts[name] for name in LASTING)


LASTING = ("weights", "optimizer", "ZeRO: gradients and buckets", "head and masking network")
"""Parts that live between iterations."""


@dataclass(frozen=True)
class Memory:
    """Memory of one rank.

    Attributes:
        config: its batch sizes are those of all ranks.
        sharding: of every level.
        precision: bf16, tf32 or float32, of the passes.
        num_classes: of head and classifier.
    """

    config: Config
    sharding: Sharding
    precision: str
    num_classes: int

    @property
    def product(self) -> int:
        """Bytes of a number that a product returns."""
        return BF16 if self.precision == "bf16" else FLOAT32

    @cached_property
    def passes(self) -> Passes:
        return Passes(self.config, self.product)

    @cached_property
    def encoder(self) -> Weights:
        return parameters.encoder(self.config.model)

    @cached_property
    def autoencoder(self) -> Weights:
        label = parameters.label_classifier(self.config, self.num_classes)
        return self.encoder + parameters.decoder(self.config.model) + label

    @cached_property
    def small(self) -> list[Weights]:
        """Head and masking network, if there are any."""
        masking = self.config.masking
        heads = [parameters.head(self.config, self.num_classes)] * masking.learns
        return heads + [parameters.masking_network(self.config)] * masking.scored

    @property
    def estimator(self) -> str:
        """Of the influence, as a run resolves ``auto``."""
        name = self.config.hypergradient.resolve_estimator(self.product == BF16, self.sharding.zero < 3)
        if name == "exact":
            raise UserError(
                "hypergradient.estimator: exact is for tiny models and has no plan; use fd or jvp"
            )
        return name

    def rank_batch(self, level: str) -> int:
        """Images of one rank.

        Raises:
            UserError: the ranks do not divide the batch.
        """
        size, ranks = getattr(self.config, level).batch_size, self.sharding.ranks
        if size % ranks:
            raise UserError(f"{level}.batch_size: {size} is not divisible by {ranks} ranks")
        return int(size // ranks)

    def lasting(self) -> dict[str, int]:
        """Bytes between iterations by part; those of ``host`` apart."""
        sharding, main = self.sharding, self.autoencoder
        zero, optimizer = 0, sharding.optimizer(main)
        if sharding.zero == 3:
            zero = sum(sharding.gradient_shard(w) + sharding.buckets(w) for w in (main, *self.small))
        small = sum(sharding.weights(w) + sharding.optimizer(w) for w in self.small)
        return {
            "weights": sharding.weights(main),
            "optimizer": 0 if sharding.offload else optimizer,
            "ZeRO: gradients and buckets": zero,
            "head and masking network": small,
        }

    def host(self) -> int:
        """Bytes in host memory: an offloaded optimizer with its gradients and copies, offloaded weights."""
        sharding, main = self.sharding, self.autoencoder
        optimizer = sharding.optimizer(main) + 2 * FLOAT32 * sharding.vector(main.trainable)
        weights = FLOAT32 * sharding.share(main.all)
        return sharding.offload * optimizer + sharding.offload_weights * weights

    def phases(self) -> list[Phase]:
        """Every phase that may be the worst."""
        phases = [self._pretrain()]
        if self.config.masking.learns:
            phases += [self._direction(), self._influence()]
            if self.sharding.zero in (1, 2):
                phases.append(self._small_step())
        elif self.config.masking.scored:
            phases.append(self._hardness())
        return phases

    def worst(self) -> Phase:
        """The phase that needs the most."""
        return max(self.phases(), key=lambda phase: phase.total)

    def runtime(self, phase: Phase) -> int:
        """What a GPU needs beside its tensors; an assumption, see the constants above."""
        nccl = NCCL_BYTES if self.sharding.ranks > 1 else 0
        return CONTEXT_BYTES + nccl + math.ceil(LOST_SHARE * phase.beyond)

    def masked_batch(self) -> int:
        """Bytes of a pretrain batch with its mask and, where a network scores them, its patches."""
        model, images = self.config.model, self.rank_batch("pretrain")
        numbers = self._pixels()
        if self.config.masking.scored:
            numbers += model.num_patches * SIZES[model.arch][0]
        # Positions are 64 bits long; the mask is float32.
        selection = 8 * self.config.num_keep + (8 + FLOAT32) * model.num_patches
        return images * (FLOAT32 * numbers + selection)

    def _pixels(self) -> int:
        height, width = self.config.model.size
        return self.config.model.in_chans * height * width

    def _phase(self, name: str, parts: Mapping[str, int]) -> Phase:
        return Phase(name, {**self.lasting(), **parts})

    def _pretrain(self) -> Phase:
        config, sharding, main = self.config, self.sharding, self.autoencoder
        images, parts = self.rank_batch("pretrain"), config.pretrain.micro_batches
        if images % parts:
            raise UserError(
                f"pretrain.micro_batches: {parts} does not divide a rank's batch of {images} images"
            )
        layers = self.passes.pretrain(images // parts)
        whole = FLOAT32 * main.trainable
        piles_up = parts == 1 and sharding.zero < 2
        activations, gradients = peak(layers, piles_up)
        held = 0
        if sharding.zero in (1, 2):
            # A rank's part of the reduced gradients, and where they wait for it.
            held = FLOAT32 * sharding.share(main.trainable) + sharding.buckets(main)
        elif sharding.zero == 0:
            held = sharding.buckets(main)
        if parts > 1 and sharding.zero < 2:
            gradients += whole
        largest = max(layer.weights for layer in layers)
        # One batch is the caller's, who logs it; another one that of the step before.
        others = 1 + (config.pretrain.unroll_steps > 1)
        scores = self.passes.masking(images) if config.masking.scored else 0
        batches = (1 + others) * self.masked_batch()
        return self._phase(
            "pretrain step",
            {
                "gradients": gradients + held + sharding.gathered(main, largest),
                # A slope is made when the activations are gone.
                "activations": max(activations, scores, self._slopes(True) - self._slopes(False)),
                "direction v": 0,
                "copies of the weights": self._slopes(recorded=False),
                "batches": batches,
            },
        )

    def _slopes(self, recorded: bool) -> int:
        """Bytes of the derivatives of AdamW steps that are kept.

        Args:
            recorded: whether this iteration's has been made; another one may belong to the logged batch.
        """
        hypergradient = self.config.hypergradient
        if not self.config.masking.learns or hypergradient.precondition != "adam":
            return 0
        slopes = recorded + (hypergradient.every == 1)
        return slopes * FLOAT32 * self.sharding.vector(self.autoencoder.trainable)

    def _level_batches(self) -> int:
        """Bytes of both batches with labels, of the last pretrain batch and of the one that is logged."""
        images = self.rank_batch("head") + self.rank_batch("mask")
        return FLOAT32 * images * self._pixels() + 2 * self.masked_batch()

    def _direction(self) -> Phase:
        config, sharding = self.config, self.sharding
        train, heldout = self.rank_batch("head"), self.rank_batch("mask")
        together = config.levels == 3
        layers = self.passes.features(train + heldout if together else heldout)
        activations, gradients = peak(layers, sharding.zero < 2)
        if together:
            activations += FLOAT32 * (train + heldout) * self._pixels()
        else:
            activations = max(activations, self.passes.pooled(train))
        if config.data.has_label_maps:
            inside = sum(layer.kept for layer in layers)
            inside += FLOAT32 * (train + heldout) * self._pixels() if together else 0
            activations = max(activations, self._pixel_logits(train, heldout, inside))
        held = 0
        if sharding.zero in (1, 2):
            held = sharding.buckets(self.autoencoder)
        v = FLOAT32 * sharding.vector(self.autoencoder.trainable) if sharding.zero else 0
        largest = max(layer.weights for layer in layers)
        return self._phase(
            "direction",
            {
                "gradients": gradients + held + sharding.gathered(self.encoder, largest),
                "activations": activations,
                "direction v": v,
                "copies of the weights": self._slopes(recorded=True),
                "batches": self._level_batches(),
            },
        )

    def _pixel_logits(self, train: int, heldout: int, inside: int) -> int:
        """Bytes while a head that labels pixels is differentiated, and in its own step.

        How many copies of its logits there are at once was measured, see ``tests/planning``.

        Args:
            inside: bytes that the encoder keeps meanwhile.
        """
        height, width = self.config.model.size
        image = FLOAT32 * self.num_classes * height * width
        step = 4.3 * train
        if self.config.levels == 2:
            return math.ceil(max(inside + 3 * heldout * image, step * image))
        implicit = self.config.hypergradient.best_response == "implicit"
        copies = max((9.5 if implicit else 7) * train, 4 * train + 2.5 * heldout)
        return inside + math.ceil(copies * image)

    def _influence(self) -> Phase:
        config, sharding, main = self.config, self.sharding, self.autoencoder
        images = math.ceil(config.hypergradient.share * self.rank_batch("pretrain"))
        vector = FLOAT32 * sharding.vector(main.trainable)
        name, precision = self.estimator, config.hypergradient.precision
        full = precision == "float32" or (precision == "auto" and name == "fd")
        product = FLOAT32 if full else self.product
        v = vector if sharding.zero else FLOAT32 * self.encoder.trainable
        if config.hypergradient.precondition == "adam":
            v += vector
        if name == "jvp":
            activations, copies = self.passes.tangents(images, product), vector
            if sharding.zero in (1, 2):
                # Whole weights and a whole v, the second of them still in its parts.
                copies += 3 * FLOAT32 * main.trainable
        else:
            # The weights before the step, and the present ones, which come back.
            activations, copies = self.passes.evaluation(images, product), 2 * vector
            if product < FLOAT32:
                copies += BF16 * main.products
        step = self.passes.masking_step(images)
        largest = FLOAT32 * max(parameters.block(SIZES[config.model.arch][0]).trainable, 1)
        return self._phase(
            "influence and mask step",
            {
                "gradients": sharding.gathered(main, largest),
                "activations": max(activations, step),
                "direction v": v,
                "copies of the weights": copies + self._slopes(recorded=True),
                "batches": self._level_batches(),
            },
        )

    def _hardness(self) -> Phase:
        """The masking network's step under policy ``hard``: on the last pretrain batch and its pairs."""
        (network,), images = self.small, self.rank_batch("pretrain")
        buckets = self.sharding.buckets(network) if self.sharding.zero in (1, 2) else 0
        step = self.passes.masking_step(images)
        # In the loss the network holds half of what its step takes at the most.
        loss = step // 2 + PAIR_COPIES * FLOAT32 * images * self.config.model.num_patches**2
        return self._phase(
            "step of the masking network",
            {
                "gradients": buckets + FLOAT32 * network.trainable,
                "activations": max(step, loss),
                "direction v": 0,
                "copies of the weights": 0,
                "batches": 2 * self.masked_batch(),
            },
        )

    def _small_step(self) -> Phase:
        """The step of the head or the masking network, each with buckets of its own under ZeRO 1 and 2."""
        network = max(self.small, key=lambda weights: weights.trainable)
        images = math.ceil(self.config.hypergradient.share * self.rank_batch("pretrain"))
        v = FLOAT32 * self.sharding.vector(self.autoencoder.trainable)
        return self._phase(
            "steps of head and masking network",
            {
                "gradients": self.sharding.buckets(network) + FLOAT32 * network.trainable,
                "activations": self.passes.masking_step(images),
                "direction v": v,
                "copies of the weights": self._slopes(recorded=True),
                "batches": self._level_batches(),
            },
        )
