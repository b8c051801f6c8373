"""Images with boxes, in the layout of COCO: a folder of images and a JSON file per split."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, FiniteFloat, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked
from torch import Tensor

from mlomae.data.dataset import PartFiles
from mlomae.data.decoding import decode_image
from mlomae.data.faults import BadSample, Fault
from mlomae.data.folder import FilesSource
from mlomae.errors import UserError
from mlomae.sections import Location, Section, Share

TOLERANCE = 1.0  # pixels by which a box may leave its image: annotators round outwards


class BoxesConfig(Section):
    """Where images with boxes come from."""

    path: Location | None = Field(
        None, description="folder with annotations/instances_SPLIT.json and a folder SPLIT of images each"
    )
    train: str = Field("train", description="split to train on; COCO's is train2017")
    test: str = Field("test", description="split that is scored, once, after training")
    max_bad_share: Share = Field(0.01, description="of the samples that may be bad; they are passed over")
    workers: int = Field(0, ge=0, description="loader processes; 0 loads in the main process")


@dataclass(frozen=True)
class Objects:
    """What an image shows.

    Attributes:
        boxes: float32 [n, 4]: left, top, right, bottom in pixels of the image file.
        labels: int64 [n], from 1.
        crowd: bool [n], whether a box holds many of its class.
        areas: float32 [n], in square pixels; of the objects themselves, where the file tells.
    """

    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    areas: Tensor


class BoxSource:
    """The images of a split, in the order of its JSON file, and the objects in each.

    Args:
        root: folder of the images.
        names: of the files in it; they serve as keys.
        sizes: (height, width) of each in pixels.
        categories: names of the classes 1, 2, …
        first: int64 [N + 1]; objects first[i] … first[i + 1] are in image i.
        objects: of all images.
        faults: annotations that were left out.
    """

    def __init__(
        self,
        root: Path,
        names: Sequence[str],
        sizes: Sequence[tuple[int, int]],
        categories: Sequence[str],
        first: NDArray[np.int64],
        objects: Objects,
        faults: tuple[Fault, ...],
    ) -> None:
        self.keys, self.sizes, self.categories, self.faults = names, sizes, categories, faults
        self.files = PartFiles(root, names)
        self._source = FilesSource(root, names, None)
        self._first, self._objects = first, objects

    def __len__(self) -> int:
        return len(self.keys)

    def content(self, index: int) -> bytes:
        """The encoded file of an image.

        Raises:
            BadSample: it cannot be read.
        """
        return self._source.content(index)

    def image(self, index: int, in_chans: int) -> Tensor:
        """uint8 [in_chans, H, W], of the size that the annotations speak of.

        Raises:
            BadSample: it cannot be decoded or has another size.
        """
        pixels = decode_image(self.content(index), in_chans)
        (height, width), (found_height, found_width) = self.sizes[index], pixels.shape[1:]
        if (found_height, found_width) != (height, width):
            raise BadSample(
                "label", f"{found_width} x {found_height} pixels, but {width} x {height} by its annotations"
            )
        return pixels

    def objects(self, index: int) -> Objects:
        """What image ``index`` shows; may be nothing."""
        part, of = slice(*self._first[index : index + 2]), self._objects
        return Objects(of.boxes[part], of.labels[part], of.crowd[part], of.areas[part])


def open_boxes(data: BoxesConfig) -> tuple[BoxSource, BoxSource]:
    """The training and the test split; of the test images only the names and annotations are read.

    Raises:
        UserError: something is missing or contradicts itself, or the splits differ in their categories.
    """
    assert data.path is not None, "the task's configuration requires it"
    root = Path(data.path)
    train, test = _open_split(root, data.train), _open_split(root, data.test)
    if train.categories != test.categories:
        raise UserError(
            f"data.test: {data.test} has the categories {_few(test.categories)}, but {data.train} has "
            f"{_few(train.categories)}; both need the same ones, under the same ids"
        )
    return train, test


# Of the JSON files; what is not listed here is passed over.


@checked(slots=True)
class _Image:
    id: int
    file_name: str
    width: int
    height: int


@checked(slots=True)
class _Annotation:
    id: int
    image_id: int
    category_id: int
    bbox: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]  # left, top, width, height
    area: FiniteFloat | None = None
    iscrowd: int = 0


@checked(slots=True)
class _Category:
    id: int
    name: str


@checked(slots=True)
class _Document:
    images: list[_Image]
    annotations: list[_Annotation]
    categories: list[_Category]


def _open_split(root: Path, split: str) -> BoxSource:
    file, folder = root / "annotations" / f"instances_{split}.json", root / split
    document = _read(file)
    _require_distinct(file, "image id", (image.id for image in document.images))
    _require_distinct(file, "file name", (image.file_name for image in document.images))
    _require_distinct(file, "category id", (category.id for category in document.categories))
    _require_distinct(file, "category name", (category.name for category in document.categories))
    _require_files(file, folder, [image.file_name for image in document.images])
    for name in ("images", "categories", "annotations"):
        if not getattr(document, name):
            raise UserError(f"{file}: its list of {name} is empty; a split needs at least one")
    categories = sorted(document.categories, key=lambda category: category.id)
    first, objects, faults = _gather(file, document, [category.id for category in categories])
    return BoxSource(
        folder,
        tuple(image.file_name for image in document.images),
        tuple((image.height, image.width) for image in document.images),
        tuple(category.name for category in categories),
        first,
        objects,
        faults,
    )


def _read(file: Path) -> _Document:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(
            f"data.path: {file} cannot be read ({error.strerror}); expected the annotations of a split in "
            "COCO's format"
        ) from None
    try:
        return TypeAdapter(_Document).validate_json(content)
    except ValidationError as error:
        problem = error.errors(include_url=False, include_input=False)[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in problem["loc"])
        where = f"{place.removeprefix('.')}: " if place else ""
        raise UserError(f"{file}: {where}{problem['msg']}; expected COCO's format") from None


def _require_distinct(file: Path, what: str, values: Iterable[int | str]) -> None:
    value, count = next(iter(Counter(values).most_common(1)), ("", 0))
    if count > 1:
        raise UserError(f"{file}: {what} {value!r} is there {count} times; each may be there once")


def _require_files(file: Path, folder: Path, names: Sequence[str]) -> None:
    try:
        there = set(os.listdir(folder))
    except OSError as error:
        raise UserError(
            f"data.path: {folder} cannot be read ({error.strerror}); expected the images of {file.name}"
        ) from None
    for name in names:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise UserError(f"{file}: file name {name!r} leaves the folder {folder}; give one inside of it")
    missing = [name for name in names if name not in there and not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{file}: {len(missing)} of its {len(names)} images are not in {folder}, such as {missing[0]}; "
            "add them, or take them out of the file"
        )


def _gather(
    file: Path, document: _Document, category_ids: Sequence[int]
) -> tuple[NDArray[np.int64], Objects, tuple[Fault, ...]]:
    """Objects by image. A box without any width or height is a fault: COCO's own files have two of them."""
    index_of = {image.id: index for index, image in enumerate(document.images)}
    label_of = {number: label for label, number in enumerate(category_ids, start=1)}
    faults: list[Fault] = []
    rows: list[list[tuple[tuple[float, ...], int, bool, float]]] = [[] for _ in document.images]
    for annotation in document.annotations:
        if annotation.image_id not in index_of:
            _refuse(file, annotation, "is of an image that is not listed")
        if annotation.category_id not in label_of:
            _refuse(file, annotation, f"is of category {annotation.category_id}, which is not listed")
        index = index_of[annotation.image_id]
        box = _corners(file, annotation, document.images[index])
        if box[2] <= box[0] or box[3] <= box[1]:
            reason = f"annotation {annotation.id} has the empty box {list(annotation.bbox)}"
            faults.append(Fault(document.images[index].file_name, "label", reason))
            continue
        area = annotation.bbox[2] * annotation.bbox[3] if annotation.area is None else annotation.area
        rows[index].append((box, label_of[annotation.category_id], bool(annotation.iscrowd), area))
    flat = [row for some in rows for row in some]
    objects = Objects(
        torch.tensor([row[0] for row in flat], dtype=torch.float32).reshape(-1, 4),
        torch.tensor([row[1] for row in flat], dtype=torch.int64),
        torch.tensor([row[2] for row in flat], dtype=torch.bool),
        torch.tensor([row[3] for row in flat], dtype=torch.float32),
    )
    return np.cumsum([0, *map(len, rows)], dtype=np.int64), objects, tuple(faults)


def _corners(file: Path, annotation: _Annotation, image: _Image) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) within the image."""
    left, top, width, height = annotation.bbox
    if width < 0 or height < 0:
        _refuse(file, annotation, "has a negative width or height; expected [left, top, width, height]")
    right, bottom = left + width, top + height
    if min(left, top, image.width - right, image.height - bottom) < -TOLERANCE:
        size = f"{image.width} x {image.height} pixels"
        _refuse(file, annotation, f"leaves its image of {size}; expected [left, top, width, height]")
    return max(left, 0.0), max(top, 0.0), min(right, image.width), min(bottom, image.height)


def _refuse(file: Path, annotation: _Annotation, problem: str) -> None:
    raise UserError(
        f"{file}: annotation {annotation.id} (image {annotation.image_id}, box {list(annotation.bbox)}) "
        f"{problem}"
    )


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return f"{shown}, … ({len(names)})" if len(names) > 5 else shown
