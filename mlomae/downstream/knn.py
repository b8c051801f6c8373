"""k-nearest neighbours on frozen features: what an encoder is worth without any training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import normalize

from mlomae.distributed import collectives
from mlomae.distributed.env import World
from mlomae.downstream.feature_set import PARTS, FeatureSet, join
from mlomae.downstream.features import FeaturesConfig, load_features
from mlomae.interop.pretrained import Pretrained
from mlomae.precision import ieee_float32
from mlomae.preemption import Preemption
from mlomae.ranges import position
from mlomae.run_dir import RunDir
from mlomae.sections import Positive

_CHUNK = 2**26  # distances that are held at once


class Config(FeaturesConfig):
    """Evaluation by k-nearest neighbours."""

    ks: Annotated[tuple[Positive, ...], Field(min_length=1)] = Field(
        (5, 20), description="numbers of neighbours to try; the held-out images choose"
    )


def run(
    config: Config, pretrained: Pretrained, run_dir: RunDir, world: World, preemption: Preemption
) -> dict[str, Any]:
    """Scores the frozen encoder; called on every rank.

    Returns:
        Figures on rank 0: ``accuracy`` on the test images with the number of neighbours ``k`` that is best on
        the held-out images, neighbours being sought among the training images; for testing also among the
        held-out ones. Both accuracies of every k tried.

    Raises:
        UserError: see ``load_features``.
    """
    collected = load_features(config, pretrained, run_dir, world)
    figures: dict[str, Any] = {}

    def score() -> None:
        train, heldout, test = (collected.parts[part] for part in PARTS)
        both = neighbours([train, heldout], world.device)
        chosen = knn_accuracies(both[: len(train)], heldout, config.ks)
        tested = knn_accuracies(both, test, config.ks)
        k = max(config.ks, key=lambda k: chosen[k])
        figures.update({"accuracy": tested[k], "k": k})
        for k in config.ks:
            figures[f"accuracy_k{k}"], figures[f"heldout_accuracy_k{k}"] = tested[k], chosen[k]
        figures["bad_samples"] = collected.bad_samples

    collectives.on_primary(score)
    return figures


def neighbours(sets: Sequence[FeatureSet], device: torch.device) -> FeatureSet:
    """The images of some sets on a device, their features of length 1, for ``knn_accuracies``."""
    return join(sets, device, normalize)


def knn_accuracies(known: FeatureSet, test: FeatureSet, ks: Sequence[int]) -> dict[int, float]:
    """Accuracies of cosine k-nearest-neighbour classifiers, neighbours weighted by 1 / distance.

    Where a neighbour's distance is 0, neighbours like it decide alone. Of classes with the same weight the
    first one wins.

    Args:
        known: neighbours, from ``neighbours``.
        test: images to classify.
        ks: numbers of neighbours; those that exceed the number of images count as that number.

    Returns:
        By k, in [0, 1].
    """
    labels, device = known.labels, known.labels.device
    most, classes = min(max(ks), len(known)), int(labels.max()) + 1
    correct = dict.fromkeys(ks, 0)
    rows = max(1, _CHUNK // len(known))
    for features, wanted in zip(test.features.split(rows), test.labels.split(rows), strict=True):
        position.number += 1
        with ieee_float32():
            similarities = normalize(features.to(device)) @ known.features.T
        nearest, indices = similarities.topk(most, dim=1)
        weights, votes = _weights((1 - nearest).clamp_min(0)), labels[indices]
        for k in correct:
            sums = weights.new_zeros(len(wanted), classes)
            # An exact neighbour is the nearest one: weights of the first k need no others.
            sums.scatter_add_(1, votes[:, :k], weights[:, :k])
            correct[k] += int((sums.argmax(dim=1) == wanted.to(device)).sum())
    return {k: count / len(test) for k, count in correct.items()}


def _weights(distances: Tensor) -> Tensor:
    """1 / distance; in rows with distances of 0, 1 for these and 0 for all others."""
    exact = distances == 0
    return torch.where(exact.any(dim=1, keepdim=True), exact.to(distances.dtype), 1 / distances)
