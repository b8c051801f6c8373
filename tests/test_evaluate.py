"""The scores of an encoder: right on easy data, blind to the test labels until the last moment."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import pytest
import sklearn.linear_model
import torch
from torch import Tensor

from mlomae.data.batches import Batch
from mlomae.distributed import collectives
from mlomae.distributed.env import World
from mlomae.downstream.feature_set import FeatureSet
from mlomae.errors import UserError
from mlomae.evaluate import PROBE_STRENGTHS, collect_features, linear_accuracy, pixels, score_features

CLASSES, DIM = 4, 6
CPU = torch.device("cpu")


def _blobs(count: int, seed: int, spread: float = 0.1) -> FeatureSet:
    """One blob per class, far apart in angle as well as in distance."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(CLASSES, size=count)
    features = 3 * np.eye(CLASSES, DIM)[labels] + spread * generator.normal(size=(count, DIM))
    return FeatureSet(torch.from_numpy(features.astype(np.float32)), torch.from_numpy(labels))


def _scores(train: FeatureSet, heldout: FeatureSet, test: FeatureSet) -> dict[str, float]:
    return score_features({"labelled": train, "heldout": heldout, "test": test}, "", k=5)


def test_separable_blobs_are_classified_without_error() -> None:
    scores = _scores(_blobs(80, 0), _blobs(40, 1), _blobs(40, 2))
    assert scores == {"knn_accuracy": 1.0, "linear_accuracy": 1.0}


def test_labels_without_relation_to_the_features_are_guessed() -> None:
    shuffled = [
        FeatureSet(_blobs(n, i).features, _blobs(n, i + 10).labels) for i, n in enumerate((400, 200, 400))
    ]
    for accuracy in _scores(*shuffled).values():
        assert accuracy == pytest.approx(1 / CLASSES, abs=0.1)


def test_a_class_that_is_held_out_as_a_whole_is_learned_in_the_last_fit() -> None:
    train, heldout, test = _blobs(80, 0), _blobs(40, 1), _blobs(40, 2)
    seen = train.labels != 2
    assert _scores(FeatureSet(train.features[seen], train.labels[seen]), heldout, test) == {
        "knn_accuracy": 1.0, "linear_accuracy": 1.0,
    }  # fmt: skip


@pytest.mark.parametrize("heldout_label", [0, 1])
def test_one_class_needs_no_probe(heldout_label: int) -> None:
    one, other, test = (_blobs(20, seed) for seed in range(3))
    train = FeatureSet(one.features, torch.zeros_like(one.labels))
    heldout = FeatureSet(other.features, torch.full_like(other.labels, heldout_label))
    expected = float((test.labels == 0).float().mean())
    found = linear_accuracy(train, heldout, test)
    assert 0 <= found <= 1 and (heldout_label or found == pytest.approx(expected))


def test_neighbours_are_training_and_heldout_images() -> None:
    train, test = _blobs(80, 0), _blobs(40, 2)
    wrong = FeatureSet(train.features, (train.labels + 1) % CLASSES)
    assert _scores(wrong, wrong, test)["knn_accuracy"] == 0.0
    # What is the same image decides alone.
    assert _scores(wrong, test, test)["knn_accuracy"] == 1.0
    assert _scores(test, wrong[:40], test)["knn_accuracy"] == 1.0


def test_the_unit_of_a_feature_does_not_matter_to_the_probe() -> None:
    sets = [_blobs(60, seed, spread=1.5) for seed in range(3)]
    units = torch.logspace(-3, 3, DIM)
    scaled = [FeatureSet(part.features * units, part.labels) for part in sets]
    assert linear_accuracy(*scaled) == pytest.approx(linear_accuracy(*sets), abs=0.02)


@pytest.fixture
def fitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, int, np.ndarray]]:
    """(strength, images, weights) of every probe that is fitted."""
    seen: list[tuple[float, int, np.ndarray]] = []

    class Recorded(sklearn.linear_model.LogisticRegression):  # type: ignore[misc]  # sklearn has no types
        def fit(self, features: np.ndarray, labels: np.ndarray) -> Any:
            super().fit(features, labels)
            seen.append((self.C, len(labels), self.coef_.copy()))
            return self

    monkeypatch.setattr(sklearn.linear_model, "LogisticRegression", Recorded)
    return seen


def test_test_labels_take_no_part_in_the_choice(fitted: list[tuple[float, int, np.ndarray]]) -> None:
    train, heldout, test = (_blobs(60, seed, spread=1.5) for seed in range(3))
    permuted = FeatureSet(test.features, test.labels.roll(7))
    honest = linear_accuracy(train, heldout, test)
    first = fitted.copy()
    fitted.clear()
    assert linear_accuracy(train, heldout, permuted) < honest - 0.2
    assert [fit[:2] for fit in fitted] == [fit[:2] for fit in first]
    assert all(np.array_equal(a[2], b[2]) for a, b in zip(first, fitted, strict=True))


def test_strength_is_chosen_on_the_heldout_set_and_the_probe_fitted_on_both(
    fitted: list[tuple[float, int, np.ndarray]],
) -> None:
    train, test = _blobs(40, 0, spread=2.5), _blobs(40, 1, spread=2.5)
    chosen = set()
    for seed in range(2, 8):
        fitted.clear()
        linear_accuracy(train, _blobs(30, seed, spread=2.5), test)
        assert [fit[:2] for fit in fitted[:-1]] == [(strength, 40) for strength in PROBE_STRENGTHS]
        assert fitted[-1][1] == 70
        chosen.add(fitted[-1][0])
    assert len(chosen) > 1  # other held-out sets, other choices


class _Loaders:
    """Blobs as 1 x 1 images with ``DIM`` channels, in batches of 16."""

    parts: ClassVar = {
        "labelled": _blobs(90, 0, 1.5),
        "heldout": _blobs(40, 1, 1.5),
        "test": _blobs(70, 2, 1.5),
    }

    def count(self, part: str) -> int:
        return len(self.parts[part])

    def evaluation(self, part: str) -> Iterator[Batch]:
        images, labels = self.parts[part].features[:, :, None, None], self.parts[part].labels
        for number, start in enumerate(range(0, len(labels), 16)):
            yield Batch(images[start : start + 16], labels[start : start + 16], number, 0)


def _evaluate(world: World, seen: list[int]) -> dict[str, float] | None:
    def encode(images: Tensor) -> Tensor:
        seen.append(len(images))
        return pixels(images)

    loaders: Any = _Loaders()
    parts = collect_features(encode, loaders, world)
    return score_features(parts, "", k=5) if parts else {}


def test_two_ranks_share_the_work_and_find_what_one_does(monkeypatch: pytest.MonkeyPatch) -> None:
    alone: list[int] = []
    expected = _evaluate(World(0, 1, CPU), alone)
    assert expected and sum(alone) == 90 + 40 + 70
    assert 0.5 < expected["knn_accuracy"] < 1

    sent: list[Any] = []
    monkeypatch.setattr(collectives, "gather_object", sent.append)  # rank 1 sends and receives None
    second: list[int] = []
    assert _evaluate(World(1, 2, CPU), second) == {}
    parts = iter(sent)
    monkeypatch.setattr(collectives, "gather_object", lambda rows: [rows, next(parts)])
    first: list[int] = []
    found = _evaluate(World(0, 2, CPU), first)
    assert sum(first) + sum(second) == sum(alone) and min(sum(first), sum(second)) > 60
    assert next(parts, None) is None
    assert found == expected  # the same images in the same order


def test_a_part_without_a_usable_image_is_an_error() -> None:
    class Empty(_Loaders):
        def evaluation(self, part: str) -> Iterator[Batch]:
            return super().evaluation(part) if part == "labelled" else iter(())

    loaders: Any = Empty()
    with pytest.raises(UserError, match="no image of the heldout set can be used"):
        collect_features(pixels, loaders, World(0, 1, CPU))


def test_features_are_taken_without_a_graph() -> None:
    weight = torch.ones(1, requires_grad=True)
    modes: list[bool] = []

    def encode(images: Tensor) -> Tensor:
        features = pixels(images) * weight
        modes.append(features.requires_grad)
        return features

    loaders: Any = _Loaders()
    collect_features(encode, loaders, World(0, 1, CPU))
    assert modes and not any(modes)


def test_pixels_are_the_image_as_a_row() -> None:
    images = torch.randn(2, 3, 4, 5)
    assert torch.equal(pixels(images), images.reshape(2, 60))
