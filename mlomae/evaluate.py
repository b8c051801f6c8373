"""How good is the encoder? k-nearest neighbours and a linear probe on frozen features, at the end of a run.

``mlomae eval`` scores an encoder afterwards, in more ways and on more images (``mlomae.downstream``). The
probe here is a regularised one with an optimum, which needs neither learning rates nor a number of epochs.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mlomae.data.batches import Batch
from mlomae.data.loader import LevelLoaders, Part
from mlomae.distributed.env import World
from mlomae.downstream.feature_set import PARTS, Encode, FeatureSet, gather_features
from mlomae.downstream.knn import knn_accuracies, neighbours
from mlomae.errors import UserError

# Inverse regularisation strengths tried on the held-out set; the test set takes no part in the choice.
PROBE_STRENGTHS = (0.01, 0.1, 1.0, 10.0)
PROBE_ITERATIONS = 1000
CPU = torch.device("cpu")


def collect_features(encode: Encode, loaders: LevelLoaders, world: World) -> dict[Part, FeatureSet]:
    """The features of the labelled, held-out and test images on rank 0, nothing elsewhere; on every rank.

    Every rank computes its share of the batches.

    Raises:
        UserError: none of the images of a part can be used.
    """
    collected: dict[Part, FeatureSet] = {}
    for part in PARTS:
        own = _own(loaders.evaluation(part), world)
        features = gather_features(encode, own, loaders.count(part), world)
        if features is not None:
            if not len(features):
                raise UserError(f"data.path: no image of the {part} set can be used; see bad_samples.jsonl")
            collected[part] = features
    return collected


def score_features(
    parts: Mapping[Part, FeatureSet], prefix: str, k: int, device: torch.device = CPU
) -> dict[str, float]:
    """Test accuracies of frozen features.

    Args:
        parts: of ``collect_features``, on rank 0.
        prefix: of the results' names.
        k: neighbours.
        device: on which neighbours are sought.

    Returns:
        ``<prefix>knn_accuracy`` and ``<prefix>linear_accuracy`` in [0, 1].
    """
    train, heldout, test = (parts[part] for part in PARTS)
    return {
        f"{prefix}knn_accuracy": knn_accuracies(neighbours([train, heldout], device), test, [k])[k],
        f"{prefix}linear_accuracy": linear_accuracy(train, heldout, test),
    }


def linear_accuracy(train: FeatureSet, heldout: FeatureSet, test: FeatureSet) -> float:
    """Accuracy of a logistic regression on standardised features.

    The regularisation with the lowest held-out cross-entropy is taken (accuracies of a small set tie
    too often), then the probe is fitted on both sets.
    """
    from sklearn.metrics import log_loss

    (x, y), (heldout_x, heldout_y), (test_x, test_y) = map(_arrays, (train, heldout, test))
    both_x, both_y = np.concatenate([x, heldout_x]), np.concatenate([y, heldout_y])
    classes, all_classes = np.unique(y), np.unique(both_y)
    if len(all_classes) < 2:
        return float((test_y == all_classes[0]).mean())
    # In a small set a class may be held out as a whole, and no regularisation predicts it.
    known = np.isin(heldout_y, classes)
    probe, best = _probe(), min(PROBE_STRENGTHS)
    if len(classes) > 1 and known.any():
        losses = {}
        # From the strongest regularisation to the weakest: each optimum is near to the one before.
        for strength in sorted(PROBE_STRENGTHS):
            _fit(probe, strength, x, y)
            predicted = probe.predict_proba(heldout_x[known])
            losses[strength] = float(log_loss(heldout_y[known], predicted, labels=classes))
        best = min(PROBE_STRENGTHS, key=losses.__getitem__)
    if len(all_classes) > len(classes):
        probe = _probe()  # the last fit has no place for the others
    _fit(probe, best, both_x, both_y)
    return float(probe.score(test_x, test_y))


def pixels(images: Tensor) -> Tensor:
    """The baseline without an encoder: [B, C, H, W] → [B, C*H*W]."""
    return images.flatten(1)


def _probe() -> Any:
    """A logistic regression on standardised features, which starts where its last fit ended."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = LogisticRegression(max_iter=PROBE_ITERATIONS, warm_start=True)
    return Pipeline([("scaler", StandardScaler()), ("classifier", classifier)])


def _fit(probe: Any, strength: float, features: np.ndarray, labels: np.ndarray) -> None:
    from sklearn.exceptions import ConvergenceWarning

    probe.set_params(classifier__C=strength)
    with warnings.catch_warnings():
        # A probe that is still creeping after PROBE_ITERATIONS is scored as it stands.
        warnings.simplefilter("ignore", ConvergenceWarning)
        probe.fit(features, labels)


def _arrays(part: FeatureSet) -> tuple[np.ndarray, np.ndarray]:
    return part.features.numpy(), part.labels.numpy()


def _own(batches: Iterable[Batch], world: World) -> Iterator[Batch | None]:
    """In rounds of one batch for each rank: this rank's batch, or None where there are no more.

    Args:
        batches: all of them, on every rank.
    """
    own, count = None, 0
    for count, batch in enumerate(batches, 1):
        if (count - 1) % world.size == world.rank:
            own = batch
        if count % world.size == 0:
            yield own
            own = None
    if count % world.size:
        yield own
