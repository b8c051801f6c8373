"""Average precision against cases whose figures follow from its definition."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mlomae.data.boxes import BoxSource, Objects
from mlomae.downstream.average_precision import Found, average_precision

# One object per row: image, class, box. Sides of 20, 40 and 100 pixels: small, medium and large.
TRUE = [
    (0, 1, (10, 10, 30, 30)),
    (0, 2, (40, 10, 80, 50)),
    (1, 1, (50, 50, 150, 150)),
    (2, 2, (0, 0, 40, 40)),
]


@pytest.fixture
def source() -> BoxSource:
    boxes = torch.tensor([box for _, _, box in TRUE], dtype=torch.float32)
    labels = torch.tensor([label for _, label, _ in TRUE])
    sides = boxes[:, 2:] - boxes[:, :2]
    objects = Objects(boxes, labels, torch.zeros(4, dtype=torch.bool), sides.prod(dim=1))
    first = np.array([0, 2, 3, 4, 4])
    names = [f"{index}.png" for index in range(4)]
    return BoxSource(Path(), names, [(200, 200)] * 4, ("cell", "dot"), first, objects, ())


def found(boxes: list[tuple[int, int, tuple[float, ...], float]]) -> list[Found]:
    """Of (image, class, box, score)."""
    result = []
    for index in range(4):
        own = [box for box in boxes if box[0] == index]
        result.append(
            Found(
                index,
                np.array([box[2] for box in own], np.float32).reshape(-1, 4),
                np.array([box[3] for box in own], np.float32),
                np.array([box[1] for box in own], np.int64),
            )
        )
    return result


def test_perfect_boxes(source: BoxSource) -> None:
    figures = average_precision(source, found([(*row, 0.9) for row in TRUE]))

    names = {"ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large", "ap/cell", "ap/dot"}
    assert figures == pytest.approx(dict.fromkeys(names, 1.0))


def test_nothing_found(source: BoxSource) -> None:
    assert set(average_precision(source, found([])).values()) == {0.0}


def test_a_shifted_box_counts_up_to_its_overlap(source: BoxSource) -> None:
    def shift(box: tuple[int, ...]) -> tuple[float, ...]:
        # A quarter of its width: an overlap of 0.75 / 1.25 = 0.6.
        by = 0.2499 * (box[2] - box[0])
        return box[0] + by, box[1], box[2] + by, box[3]

    figures = average_precision(source, found([(i, label, shift(box), 0.9) for i, label, box in TRUE]))

    assert (figures["ap50"], figures["ap75"]) == (1.0, 0.0)
    assert figures["ap"] == pytest.approx(3 / 10)  # of the thresholds 0.5, 0.55, …, 0.95


def test_classes_and_ranks_matter(source: BoxSource) -> None:
    boxes = [(*row, 0.9) for row in TRUE]
    # A cell taken for a dot, and a wrong box that is surer than the right ones.
    boxes[0] = (0, 2, TRUE[0][2], 0.95)
    figures = average_precision(source, found(boxes))

    # Cells: one of two found, all found are right: precision 1 up to recall 0.5, on a grid of 101 points.
    assert figures["ap/cell"] == pytest.approx(51 / 101)
    # Dots: the first of three is wrong: precision 2/3 at best, at every recall.
    assert figures["ap/dot"] == pytest.approx(2 / 3)
    assert figures["ap"] == pytest.approx((51 / 101 + 2 / 3) / 2)


def test_images_that_were_not_looked_at_do_not_count(source: BoxSource) -> None:
    figures = average_precision(source, found([(*row, 0.9) for row in TRUE[2:3]])[1:2])

    assert [figures[name] for name in ("ap/cell", "ap_large", "ap")] == pytest.approx([1.0] * 3)
    assert math.isnan(figures["ap/dot"]) and math.isnan(figures["ap_small"])
