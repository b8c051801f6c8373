"""How good is the encoder? k-nearest neighbours and a linear probe on frozen features."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlomae.data.loader import LevelLoaders, Part
from mlomae.distributed import collectives
from mlomae.distributed.env import World
from mlomae.errors import UserError
from mlomae.ranges import position

Array = np.ndarray
Encode = Callable[[Tensor], Tensor]
"""Images [B, C, H, W] on the world's device → features [B, D]."""
# Inverse regularisation strengths tried on the held-out set; the test set takes no part in the choice.
PROBE_STRENGTHS = (0.01, 0.1, 1.0, 10.0)
PROBE_ITERATIONS = 1000


@dataclass(frozen=True)
class FeatureSet:
    """Features [N, D] and labels [N] of one part."""

    features: Array
    labels: Array


def collect_features(encode: Encode, loaders: LevelLoaders, world: World) -> dict[Part, FeatureSet]:
    """The features of the labelled, held-out and test images on rank 0, nothing elsewhere; on every rank.

    Every rank computes its share of the batches.
    """
    parts: tuple[Part, ...] = ("labelled", "heldout", "test")
    collected = {part: _features(encode, loaders, part, world) for part in parts}
    return {part: features for part, features in collected.items() if features is not None}


def score_features(parts: Mapping[Part, FeatureSet], prefix: str, k: int) -> dict[str, float]:
    """Test accuracies of frozen features.

    Args:
        parts: of ``collect_features``, on rank 0.
        prefix: of the results' names.
        k: neighbours.

    Returns:
        ``<prefix>knn_accuracy`` and ``<prefix>linear_accuracy`` in [0, 1].
    """
    train, heldout, test = parts["labelled"], parts["heldout"], parts["test"]
    return {
        f"{prefix}knn_accuracy": knn_accuracy(_join(train, heldout), test, k),
        f"{prefix}linear_accuracy": linear_accuracy(train, heldout, test),
    }


def knn_accuracy(train: FeatureSet, test: FeatureSet, k: int) -> float:
    """Cosine k-nearest-neighbour accuracy, neighbours weighted by inverse distance."""
    from sklearn.neighbors import KNeighborsClassifier

    classifier = KNeighborsClassifier(min(k, len(train.labels)), weights="distance", metric="cosine")
    classifier.fit(train.features, train.labels)
    return float(classifier.score(test.features, test.labels))


def linear_accuracy(train: FeatureSet, heldout: FeatureSet, test: FeatureSet) -> float:
    """Accuracy of a logistic regression on standardised features.

    The regularisation with the lowest held-out cross-entropy is taken (accuracies of a small set tie
    too often), then the probe is fitted on both sets.
    """
    from sklearn.metrics import log_loss

    classes = np.unique(train.labels)

    def heldout_loss(strength: float) -> float:
        probabilities = _fit_probe(strength, train).predict_proba(heldout.features)
        return float(log_loss(heldout.labels, probabilities, labels=classes))

    best = min(PROBE_STRENGTHS, key=heldout_loss)
    return float(_fit_probe(best, _join(train, heldout)).score(test.features, test.labels))


def pixels(images: Tensor) -> Tensor:
    """The baseline without an encoder: [B, C, H, W] → [B, C*H*W]."""
    return images.flatten(1)


def _fit_probe(strength: float, part: FeatureSet) -> Any:
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    probe = make_pipeline(StandardScaler(), LogisticRegression(C=strength, max_iter=PROBE_ITERATIONS))
    with warnings.catch_warnings():
        # A probe that is still creeping after PROBE_ITERATIONS is scored as it stands.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return probe.fit(part.features, part.labels)


@torch.no_grad()
def _features(encode: Encode, loaders: LevelLoaders, part: Part, world: World) -> FeatureSet | None:
    """One part's features on rank 0; every rank computes its share of the batches."""
    rows: list[tuple[Array, Array]] = []
    for batch in loaders.evaluation(part):
        position.number += 1  # on all ranks: whoever computes it, it is progress
        if batch.number % world.size == world.rank:
            assert batch.labels is not None
            features = encode(batch.images.to(world.device)).float().cpu().numpy()
            rows.append((features, batch.labels.numpy()))
    gathered = collectives.gather_object(rows)
    if gathered is None:
        return None
    flat = [row for rank_rows in gathered for row in rank_rows]
    if not flat:
        raise UserError(f"data.path: no image of the {part} set can be used; see bad_samples.jsonl")
    return FeatureSet(np.concatenate([f for f, _ in flat]), np.concatenate([y for _, y in flat]))


def _join(a: FeatureSet, b: FeatureSet) -> FeatureSet:
    return FeatureSet(np.concatenate([a.features, b.features]), np.concatenate([a.labels, b.labels]))
