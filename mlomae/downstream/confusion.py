"""The confusion matrix of a segmentation, and the figures that are made of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mlomae.data.dataset import VOID
from mlomae.distributed import collectives


class Confusion:
    """Counts pixels by true and predicted class over all images of all ranks.

    Attributes:
        counts: int64 [C, C]; row: true class, column: predicted class.
    """

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def add(self, predicted: Tensor, truth: Tensor) -> None:
        """Counts the pixels that are not VOID in ``truth``; both are integer tensors of one shape."""
        counted = truth != VOID
        num_classes = len(self.counts)
        cells = truth[counted].long() * num_classes + predicted[counted].long()
        self.counts += torch.bincount(cells, minlength=num_classes**2).view_as(self.counts)

    def reduce(self) -> None:
        """Sums over ranks; called once, on all of them."""
        self.counts = collectives.total(self.counts)

    def figures(self, names: Sequence[str]) -> dict[str, float]:
        """miou, pixel_accuracy, mean_class_accuracy and ``iou/<name>`` of each class, in [0, 1].

        A class that occurs neither in the truth nor in the predictions has no IoU (NaN) and does not count
        in the mean, as in torchmetrics and mmsegmentation; the mean accuracy is that of the classes that
        occur in the truth.
        """
        counts = self.counts.double().cpu()
        hits, true, predicted = counts.diagonal(), counts.sum(dim=1), counts.sum(dim=0)
        iou = hits / (true + predicted - hits)  # 0 / 0 is NaN
        return {
            "miou": float(iou.nanmean()),
            "pixel_accuracy": float(hits.sum() / true.sum()),
            "mean_class_accuracy": float((hits / true).nanmean()),
            **{f"iou/{name}": float(value) for name, value in zip(names, iou, strict=True)},
        }
