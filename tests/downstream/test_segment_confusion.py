"""The figures of a segmentation against a loop over pixels and against torchmetrics."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from mlomae.data.scenes import VOID
from mlomae.downstream.confusion import Confusion

NUM_CLASSES = 5
NAMES = ("a", "b", "c", "d", "e")


def draw_pair(seed: int, present: int = NUM_CLASSES) -> tuple[Tensor, Tensor]:
    """Predicted and true classes [2, 8, 9] below ``present``; a fifth of the truth is void."""
    generator = torch.Generator().manual_seed(seed)
    predicted, truth = torch.randint(present, (2, 2, 8, 9), generator=generator)
    truth[torch.rand(truth.shape, generator=generator) < 0.2] = VOID
    return predicted, truth.to(torch.uint8)


def figures_of(*pairs: tuple[Tensor, Tensor]) -> dict[str, float]:
    confusion = Confusion(NUM_CLASSES, torch.device("cpu"))
    for predicted, truth in pairs:
        confusion.add(predicted, truth)
    confusion.reduce()
    return confusion.figures(NAMES)


def test_counts_are_those_of_a_loop_over_pixels() -> None:
    predicted, truth = draw_pair(0)
    confusion = Confusion(NUM_CLASSES, torch.device("cpu"))
    confusion.add(predicted, truth)

    expected = torch.zeros(NUM_CLASSES, NUM_CLASSES, dtype=torch.int64)
    for guess, true in zip(predicted.flatten().tolist(), truth.flatten().tolist(), strict=True):
        if true != VOID:
            expected[true, guess] += 1
    assert confusion.counts.dtype == torch.int64
    assert torch.equal(confusion.counts, expected)


@pytest.mark.parametrize("present", [NUM_CLASSES, NUM_CLASSES - 2])
def test_figures_are_those_of_torchmetrics(present: int) -> None:
    """Also where classes are absent from both, which must not count in a mean."""
    pairs = [draw_pair(seed, present) for seed in range(3)]
    figures = figures_of(*pairs)

    def by_torchmetrics(metric: type, average: str) -> Tensor:
        measure = metric(NUM_CLASSES, average=average, ignore_index=VOID)
        for predicted, truth in pairs:
            measure.update(predicted, truth.long())
        result: Tensor = measure.compute()
        return result

    iou = by_torchmetrics(MulticlassJaccardIndex, "none")
    for number, name in enumerate(NAMES):
        value = figures[f"iou/{name}"]
        assert (
            math.isnan(value) if number >= present else value == pytest.approx(float(iou[number]), abs=1e-6)
        )
    assert figures["miou"] == pytest.approx(float(by_torchmetrics(MulticlassJaccardIndex, "macro")), abs=1e-6)
    assert figures["pixel_accuracy"] == pytest.approx(
        float(by_torchmetrics(MulticlassAccuracy, "micro")), abs=1e-6
    )
    recalls = by_torchmetrics(MulticlassAccuracy, "none")[:present]
    assert figures["mean_class_accuracy"] == pytest.approx(float(recalls.mean()), abs=1e-6)


def test_a_class_that_is_only_predicted_counts_as_missed_in_miou_and_not_in_the_accuracy() -> None:
    truth = torch.tensor([[0, 0, 0, 1]], dtype=torch.uint8)
    figures = figures_of((torch.tensor([[0, 0, 2, 1]]), truth))

    assert figures["iou/c"] == 0
    assert figures["miou"] == pytest.approx((2 / 3 + 1 + 0) / 3)
    assert figures["mean_class_accuracy"] == pytest.approx((2 / 3 + 1) / 2)


def test_a_map_that_is_void_throughout_changes_nothing() -> None:
    void = torch.full((1, 4, 4), VOID, dtype=torch.uint8)
    pair = draw_pair(0)
    assert figures_of(pair) == figures_of(pair, (torch.zeros(1, 4, 4, dtype=torch.int64), void))
