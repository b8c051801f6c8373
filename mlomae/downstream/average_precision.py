"""COCO's figures for detections: average precision over thresholds of overlap, by pycocotools."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlomae.data.boxes import BoxSource

# The first six of COCOeval's twelve numbers.
FIGURES = ("ap", "ap50", "ap75", "ap_small", "ap_medium", "ap_large")


@dataclass(frozen=True)
class Found:
    """What a detector found in one image.

    Attributes:
        index: of the image in its source.
        boxes: float32 [n, 4]: left, top, right, bottom in pixels of the image file.
        scores: float32 [n].
        labels: int64 [n], from 1.
    """

    index: int
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]


def average_precision(source: BoxSource, found: Sequence[Found]) -> dict[str, float]:
    """Figures in [0, 1] over the images that ``found`` has an entry for; NaN where no object counts.

    Returns:
        ap (over overlaps of 0.5 to 0.95), ap50, ap75, ap of small (below 32 x 32 pixels), medium and large
        (above 96 x 96) objects, and ap/NAME of each category.
    """
    from pycocotools.cocoeval import COCOeval

    images = [{"id": entry.index} for entry in found]
    categories = [{"id": label, "name": name} for label, name in enumerate(source.categories, start=1)]
    with redirect_stdout(io.StringIO()):  # it prints a table and what it is about to do
        truth = _index(images, categories, _true_boxes(source, found))
        scorer = COCOeval(truth, _index(images, categories, _found_boxes(found)), "bbox")
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    figures = {name: _known(value) for name, value in zip(FIGURES, scorer.stats, strict=False)}
    # [overlap, recall, category, area, detections per image]: of all areas, and of the most detections.
    precision = scorer.eval["precision"][:, :, :, 0, -1]
    for number, name in enumerate(source.categories):
        figures[f"ap/{name}"] = _known(precision[:, :, number].mean())
    return figures


def _known(value: float) -> float:
    """COCOeval says -1 where there is nothing to find."""
    return float("nan") if value < 0 else float(value)


def _index(images: Sequence[Any], categories: Sequence[Any], boxes: Iterable[dict[str, Any]]) -> Any:
    from pycocotools.coco import COCO

    index = COCO()
    # Numbered from 1: COCOeval takes an annotation 0 for none.
    annotations = [{"id": number, **box} for number, box in enumerate(boxes, start=1)]
    index.dataset = {"images": images, "categories": categories, "annotations": annotations}
    index.createIndex()
    return index


def _true_boxes(source: BoxSource, found: Sequence[Found]) -> Iterable[dict[str, Any]]:
    for entry in found:
        objects = source.objects(entry.index)
        columns = zip(
            objects.boxes.tolist(),
            objects.labels.tolist(),
            objects.crowd.tolist(),
            objects.areas.tolist(),
            strict=True,
        )
        for box, label, crowd, area in columns:
            yield _annotation(entry.index, box, label) | {"area": area, "iscrowd": int(crowd)}


def _found_boxes(found: Sequence[Found]) -> Iterable[dict[str, Any]]:
    for entry in found:
        columns = zip(entry.boxes.tolist(), entry.labels.tolist(), entry.scores.tolist(), strict=True)
        for box, label, score in columns:
            annotation = _annotation(entry.index, box, label)
            area = annotation["bbox"][2] * annotation["bbox"][3]
            yield annotation | {"area": area, "iscrowd": 0, "score": score}


def _annotation(index: int, box: Sequence[float], label: int) -> dict[str, Any]:
    left, top, right, bottom = box
    return {"image_id": index, "category_id": label, "bbox": [left, top, right - left, bottom - top]}
