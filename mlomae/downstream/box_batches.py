"""Batches of images with boxes: batch n is a pure function of n."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mlomae.data.batches import Batches, Order, PixelBatch, permutation
from mlomae.data.boxes import BoxSource
from mlomae.data.faults import BadSample, Fault
from mlomae.data.subset import first_good, substitutes
from mlomae.downstream.box_transforms import BoxAugmentConfig, Size, augment, fit
from mlomae.random import stream_seed

CPU = torch.device("cpu")


@dataclass(frozen=True)
class BoxBatch(PixelBatch):
    """A rank's share of one global batch; its pixels hold each image in the upper left corner.

    Attributes:
        sizes: (height, width) of each image.
        boxes: float32 [n, 4], of all images; left, top, right, bottom.
        classes: int64 [n], from 1.
        counts: boxes of each image.
    """

    sizes: tuple[Size, ...]
    boxes: Tensor
    classes: Tensor
    counts: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        # Small tensors are not worth files of shared memory.
        small = [part.numpy() for part in (self.indices, self.boxes, self.classes)]
        rest = self.number, self.first_row, self.faults, self.sizes, self.counts
        return _unpack, (self.pixels, *small, *rest)

    @property
    def tensors(self) -> list[Tensor]:
        """Those that ``to`` moves."""
        return [self.pixels, self.boxes, self.classes]

    def to(self, device: torch.device) -> BoxBatch:
        """On the device; from pinned memory without waiting."""
        boxes, classes = (part.to(device, non_blocking=True) for part in (self.boxes, self.classes))
        pixels = self.pixels.to(device, non_blocking=True)
        return replace(self, pixels=pixels, boxes=boxes, classes=classes)

    def pin_memory(self) -> BoxBatch:
        """In memory that a GPU reads itself; the name is what torch's loader looks for."""
        boxes, classes = self.boxes.pin_memory(), self.classes.pin_memory()
        return replace(self, pixels=self.pixels.pin_memory(), boxes=boxes, classes=classes)

    def images(self) -> list[Tensor]:
        """float32 [C, h, w] in [0, 1], each of its own size."""
        floats = self.pixels.to(torch.float32) / 255
        return [image[:, :height, :width] for image, (height, width) in zip(floats, self.sizes, strict=True)]

    def targets(self) -> list[dict[str, Tensor]]:
        """What torchvision's detectors learn from."""
        parts = zip(self.boxes.split(self.counts), self.classes.split(self.counts), strict=True)
        return [{"boxes": boxes, "labels": labels} for boxes, labels in parts]


@dataclass(frozen=True)
class _Item:
    """An image that fits into the frame, and what it shows."""

    index: int
    image: Tensor
    boxes: Tensor
    labels: Tensor


@dataclass(frozen=True)
class TrainingBoxes(Batches):
    """An endless sequence, augmented, in a new order each epoch, whose incomplete last batch is dropped.

    Attributes:
        frame: (height, width) that no image exceeds.
    """

    source: BoxSource
    frame: Size
    in_chans: int
    config: BoxAugmentConfig
    order: Order

    def read(self, number: int) -> BoxBatch:
        order = self.order
        epoch, position = divmod(number, len(self.source) // order.batch)
        start = position * order.batch + order.first_row
        chosen = permutation(len(self.source), stream_seed(*order.seed, epoch), CPU)
        faults: list[Fault] = []
        items = [
            self._item(index, stream_seed(order.augment_seed, number, order.first_row + row), faults)
            for row, index in enumerate(chosen[start : start + order.local].tolist())
        ]
        return _collate(items, self.frame, self.in_chans, number, order.first_row, faults)

    def _item(self, wanted: int, seed: int, faults: list[Fault]) -> _Item:
        """Image ``wanted``, or where it is bad another one, which depends on ``wanted`` only."""
        source, in_chans = self.source, self.in_chans
        index, image = first_good(
            substitutes(wanted, len(source)), source.keys, lambda index: source.image(index, in_chans), faults
        )
        objects = source.objects(index)
        single = ~objects.crowd
        view = augment(image, objects.boxes[single], objects.labels[single], self.frame, self.config, seed)
        return _Item(index, *view)


@dataclass(frozen=True)
class ScoredBoxes(Batches):
    """Some images once, in order, not augmented and without their boxes; bad ones are left out.

    Attributes:
        indices: of the images.
        batch: images at a time; the last batch may be short.
    """

    source: BoxSource
    frame: Size
    in_chans: int
    indices: Sequence[int]
    batch: int

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch)

    def read(self, number: int) -> BoxBatch:
        faults: list[Fault] = []
        items = list(self._good(self.indices[number * self.batch :][: self.batch], faults))
        return _collate(items, self.frame, self.in_chans, number, 0, faults)

    def _good(self, indices: Sequence[int], faults: list[Fault]) -> Iterator[_Item]:
        nothing = torch.empty(0, 4), torch.empty(0, dtype=torch.int64)
        for index in indices:
            try:
                image = self.source.image(index, self.in_chans)
            except BadSample as bad:
                faults.append(Fault(self.source.keys[index], bad.kind, bad.reason))
            else:
                yield _Item(index, fit(image, self.frame), *nothing)


def _collate(
    items: Sequence[_Item], frame: Size, in_chans: int, number: int, first_row: int, faults: Sequence[Fault]
) -> BoxBatch:
    pixels = torch.zeros(len(items), in_chans, *frame, dtype=torch.uint8)
    for place, item in zip(pixels, items, strict=True):
        place[:, : item.image.shape[1], : item.image.shape[2]] = item.image
    return BoxBatch(
        pixels,
        torch.tensor([item.index for item in items], dtype=torch.int64),
        None,
        number,
        first_row,
        tuple(faults),
        tuple((item.image.shape[1], item.image.shape[2]) for item in items),
        torch.cat([torch.empty(0, 4), *(item.boxes for item in items)]),
        torch.cat([torch.empty(0, dtype=torch.int64), *(item.labels for item in items)]),
        tuple(len(item.labels) for item in items),
    )


def _unpack(pixels: Tensor, indices: Any, boxes: Any, classes: Any, *rest: Any) -> BoxBatch:
    number, first_row, faults, sizes, counts = rest
    own, of_boxes, of_classes = (torch.from_numpy(part) for part in (indices, boxes, classes))
    return BoxBatch(pixels, own, None, number, first_row, faults, sizes, of_boxes, of_classes, counts)
