"""Linear classifiers on frozen features: K of them, at K learning rates, in one pass over the features.

Letters: N images, B images of a chunk, F features, K classifiers ("heads"), C classes. The features are
standardised by the mean and the standard deviation of the whole training set: what the BatchNorm without
parameters in front of MAE's probe estimates from batches. Both are folded into the weights, so that the
features are read as they are.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mlomae.data.batches import permutation
from mlomae.downstream.head_steps import STEPS
from mlomae.mlo.schedule import warmup_cosine
from mlomae.random import stream_seed

INIT_STD = 0.01  # of weights, as in MAE's probe
# Logits of all heads that are held at once. On a CPU a chunk stays in its caches from its reading to its
# gradient, on a GPU it is large enough to fill the device.
_CHUNK = {"cpu": 2**17, "cuda": 2**25}
_MIN_ROWS, _MAX_ROWS = 256, 2**16
# A standard deviation below this share of the mean is rounding: the feature does not vary.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class ProbePlan:
    """How heads are trained: momentum, warm-up and cosine are the same for all of them.

    Attributes:
        batch_size: at most; an epoch is split into the fewest batches of about equal size.
        warmup: share of the steps.
        weight_decay: of the weights, not of the biases.
        standardise: features first.
        seed: of the first weights and the order of the images.
    """

    optimizer: Literal["adamw", "lars"] = "adamw"
    epochs: int = 100
    batch_size: int = 16384
    warmup: float = 0.1
    weight_decay: float = 0.0
    standardise: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Scores:
    """Of each head: mean cross-entropy, and the shares of images whose class is the first, or among the
    first five: float64 [K] on the CPU each.
    """

    loss: Tensor
    accuracy: Tensor
    top5: Tensor


class Heads:
    """K linear classifiers that are trained together and know nothing of each other.

    All begin with the same weights and see the images in the same order.

    Args:
        rates: highest learning rate of each.
        features: float32 [N, F] that they are trained on.
        labels: int64 [N] on the same device.
        classes: C.
    """

    def __init__(
        self, rates: Sequence[float], features: Tensor, labels: Tensor, classes: int, plan: ProbePlan
    ) -> None:
        self.features, self.labels, self.plan = features, labels, plan
        device, width = features.device, features.shape[1]
        self.rates = torch.tensor(rates, device=device, dtype=torch.float32)
        generator = torch.Generator().manual_seed(stream_seed(plan.seed, "probe"))
        first = torch.randn(classes, width, generator=generator) * INIT_STD
        self.weight = first.to(device).expand(len(rates), -1, -1).clone()  # [K, C, F]
        self.bias = torch.zeros(len(rates), classes, device=device)
        self.step, count = STEPS[plan.optimizer]
        self.moments = [
            [torch.zeros_like(parameter) for _ in range(count)] for parameter in (self.weight, self.bias)
        ]
        self.mean, self.scale = (
            _statistics(features)
            if plan.standardise
            else (features.new_zeros(width), features.new_ones(width))
        )
        self.batches = -(-len(labels) // plan.batch_size)

    def train_epoch(self, epoch: int) -> Tensor:
        """Takes the steps of epoch ``epoch`` (from 0).

        Returns:
            Mean cross-entropy of each head over the epoch, on the way: [K] on the device.
        """
        plan, total = self.plan, torch.zeros_like(self.rates)
        order = permutation(len(self.labels), stream_seed(plan.seed, "probe", epoch), self.labels.device)
        for number, rows in enumerate(order.tensor_split(self.batches)):
            step = epoch * self.batches + number
            factor = warmup_cosine(step, plan.epochs * self.batches, 1.0, 0.0, plan.warmup)
            losses, *gradients = self._gradients(rows)
            total += losses
            for parameter, gradient, moments in zip(
                (self.weight, self.bias), gradients, self.moments, strict=True
            ):
                self.step(parameter, gradient, moments, self.rates * factor, step, plan.weight_decay)
        return total / len(self.labels)

    def score(self, features: Tensor, labels: Tensor) -> Scores:
        """How well the heads classify other images: [M, F] and int64 [M], on the same device."""
        sums = torch.zeros(3, len(self.rates), dtype=torch.float64, device=features.device)
        folded = self._folded()
        for images, classes in zip(features.split(self._chunk), labels.split(self._chunk), strict=True):
            logits, wanted = self._classify(images, *folded), self._wanted(classes)
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == wanted
            losses = -logits.log_softmax(dim=1).gather(1, wanted)
            sums += torch.stack([losses.sum((1, 2)), best[:, 0].sum(1), best.sum((1, 2))])
        loss, accuracy, top5 = (sums / len(labels)).cpu()
        return Scores(loss, accuracy, top5)

    def state(self) -> dict[str, Tensor]:
        """All that training changes."""
        return {name: tensor for name, tensor in self._tensors()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Takes over what ``state`` gave."""
        for name, tensor in self._tensors():
            tensor.copy_(tensors[name])

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter, moments in zip(
            ("weight", "bias"), (self.weight, self.bias), self.moments, strict=True
        ):
            yield name, parameter
            yield from ((f"{name}.{number}", moment) for number, moment in enumerate(moments))

    @property
    def _chunk(self) -> int:
        """Rows that are worked on at once."""
        rows = _CHUNK[self.bias.device.type] // self.bias.numel()
        return min(max(rows, _MIN_ROWS), _MAX_ROWS)

    def _gradients(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sum of a batch's cross-entropies, [K], and the gradients of their mean, [K, C, F] and [K, C]."""
        heads, classes, width = self.weight.shape
        folded, offset = self._folded()
        losses = torch.zeros_like(self.rates)
        weight, bias = torch.zeros_like(folded), torch.zeros_like(offset)
        for chosen in rows.split(self._chunk):
            images, wanted = self.features.index_select(0, chosen), self._wanted(self.labels[chosen])
            # softmax - onehot: what autograd would find, in one piece of memory.
            slopes = self._classify(images, folded, offset).softmax(dim=1)
            likely = slopes.gather(1, wanted)
            losses -= likely.clamp_min(torch.finfo(likely.dtype).tiny).log().sum((1, 2))
            slopes.scatter_(1, wanted, likely - 1)
            flat = slopes.view(heads * classes, -1)
            weight.addmm_(flat, images)
            bias += flat.sum(1, keepdim=True)
        # Back through the standardisation.
        weight.addr_(bias[:, 0], self.mean, alpha=-1).mul_(self.scale)
        count = len(rows)
        return losses, (weight / count).view(heads, classes, width), (bias / count).view(heads, classes)

    def _classify(self, images: Tensor, folded: Tensor, offset: Tensor) -> Tensor:
        """[B, F] → [K, C, B]: images last, where the arithmetic over classes runs along memory."""
        heads, classes, _ = self.weight.shape
        return torch.addmm(offset, folded, images.T).view(heads, classes, -1)

    def _folded(self) -> tuple[Tensor, Tensor]:
        """Weights [K * C, F] and biases [K * C, 1] for features that are not standardised."""
        folded = (self.weight * self.scale).flatten(0, 1)
        return folded, self.bias.view(-1, 1) - (folded @ self.mean)[:, None]

    def _wanted(self, labels: Tensor) -> Tensor:
        """int64 [B] → [K, 1, B]."""
        return labels.expand(len(self.rates), 1, -1)


def best_head(scores: Scores) -> int | None:
    """The head with the lowest cross-entropy (accuracies of a small set tie); None if none is finite."""
    losses = [loss if math.isfinite(loss) else math.inf for loss in scores.loss.tolist()]
    best = min(range(len(losses)), key=losses.__getitem__)
    return None if losses[best] == math.inf else best


def _statistics(features: Tensor) -> tuple[Tensor, Tensor]:
    """Means [F] and reciprocals of standard deviations [F], 0 for a feature that does not vary."""
    chunks = features.split(2**14)
    mean = sum(chunk.sum(0, dtype=torch.float64) for chunk in chunks) / len(features)
    squares = sum((chunk - mean.float()).square_().sum(0, dtype=torch.float64) for chunk in chunks)
    std = (squares / len(features)).sqrt()
    return mean.float(), torch.where(std > _ROUNDING * mean.abs(), 1 / std, 0.0).float()
