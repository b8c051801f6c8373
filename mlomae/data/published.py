"""Fine-grained data sets as their authors publish them: CUB-200-2011, Stanford Cars, iNaturalist 2019."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from mlomae.data.dataset import STATISTICS, Dataset, PartFiles
from mlomae.data.decoding import MODES
from mlomae.data.folder import FilesSource
from mlomae.errors import UserError

CUB_TABLES = ("images.txt", "image_class_labels.txt", "train_test_split.txt")
CARS_TABLES = (
    ("devkit/cars_train_annos.mat", "cars_train_annos.mat"),
    ("cars_test_annos_withlabels.mat", "devkit/cars_test_annos_withlabels.mat"),
)
INAT_LISTINGS = ("train2019.json", "val2019.json")


@dataclass(frozen=True, slots=True)
class Entry:
    """One image as a set lists it."""

    name: str  # relative to the folder of the images
    number: int  # of its class, as the set counts
    place: str  # where it is written, for messages


Parts = tuple[list[Entry], list[Entry]]  # training, test


@dataclass(frozen=True)
class Layout:
    """What a set's folder holds, and who reads it."""

    title: str
    folder: str | None  # usual name of the folder, where ``data.path`` may also be the one around it
    needed: tuple[tuple[str, ...], ...]  # each is a file or folder, under one of these names
    url: str  # of a page that says where to get it
    images: str  # folder to which the images' names are relative
    read: Callable[[Mapping[str, Path]], Parts]  # of the needed files, by their first names


def open_published(name: str, path: Path, in_chans: int) -> Dataset:
    """Opens ``cub200``, ``cars`` or ``inat2019``; no image is opened.

    ``path`` is the folder that holds what the set's archives unpack to. For ``cub200`` it may also be the
    folder around ``CUB_200_2011``, for ``cars`` the one around ``stanford_cars``. Training and test part are
    the authors' (of iNaturalist, whose test labels are not public, the validation part is the test part);
    labels are the authors' class numbers, counted from 0.

    Raises:
        UserError: a file is missing or damaged, lists an image twice or not at all, or the training images'
            classes are not numbered without holes.
    """
    layout = LAYOUTS[name]
    root = path
    if layout.folder is not None and (path / layout.folder).is_dir():
        root = path / layout.folder
    train, test = layout.read(_locate(layout, root))
    _verify_names([*train, *test])
    first = 0 if name == "inat2019" else 1
    num_classes = _count_classes(train, test, first)
    images = root / layout.images

    def source(entries: Sequence[Entry]) -> FilesSource:
        labels = torch.tensor([entry.number - first for entry in entries])
        return FilesSource(images, [entry.name for entry in entries], labels)

    train_source, test_source = source(train), source(test)
    files = PartFiles(images, train_source.keys), PartFiles(images, test_source.keys)
    # CUB's folders are named after its classes, those of iNaturalist are numbers.
    folders = {entry.number: entry.name.split("/", 1)[0] for entry in train} if name == "cub200" else {}
    return Dataset(
        train_source,
        num_classes,
        *STATISTICS[MODES[in_chans]],
        open_test=lambda: test_source,
        files=files,
        class_names=tuple(folders[number] for number in sorted(folders)) or None,
    )


def _locate(layout: Layout, root: Path) -> dict[str, Path]:
    """{first name: where it lies} of all that the layout needs."""
    found = {}
    for names in layout.needed:
        present = next((root / name for name in names if (root / name).exists()), None)
        if present is None:
            expected = ", ".join(" or ".join(some) for some in layout.needed)
            raise UserError(
                f"data.path: no {' or '.join(names)} in {root}; unpack {layout.title} there (expected "
                f"{expected}); {layout.url} tells where to get it"
            )
        found[names[0]] = present
    return found


def _verify_names(entries: Sequence[Entry]) -> None:
    first: dict[str, Entry] = {}
    for entry in entries:
        known = first.setdefault(entry.name, entry)
        if known is not entry:
            raise UserError(f"{entry.place}: lists {entry.name} again, after {known.place}; expected it once")


def _count_classes(train: Sequence[Entry], test: Sequence[Entry], first: int) -> int:
    """Number of classes; those of the training images are ``first``, ``first`` + 1, … without a hole."""
    count = len({entry.number for entry in train})
    last = first + count - 1
    for entry in (*train, *test):
        if not first <= entry.number <= last:
            raise UserError(
                f"{entry.place}: class {entry.number}, expected {first} to {last}, because the training "
                f"images are of {count} classes; complete the set or renumber them"
            )
    return count


def _read_cub(files: Mapping[str, Path]) -> Parts:
    listed, classes, split = (files[name] for name in CUB_TABLES)
    names = _read_table(listed, r"\S.*", "an image id and a file name")
    numbers = _read_table(classes, r"[0-9]{1,9}", "an image id and a class number")
    in_training = _read_table(split, r"[01]", "an image id and 1 (training) or 0 (test)")
    for path, table in ((classes, numbers), (split, in_training)):
        for image, (line, _) in table.items():
            if image not in names:
                raise UserError(f"{path}:{line}: image id {image}, expected one of those in {listed.name}")
        for image, (line, _) in names.items():
            if image not in table:
                raise UserError(f"{listed}:{line}: image id {image} is missing in {path.name}; add its line")
    parts: Parts = ([], [])
    for image, (_, name) in names.items():
        line, number = numbers[image]
        part = 0 if in_training[image][1] == "1" else 1
        parts[part].append(Entry(name, int(number), f"{classes}:{line}"))
    _require_images(split, *parts)
    return parts


def _read_table(path: Path, value: str, expected: str) -> dict[int, tuple[int, str]]:
    """{image id: (line, value)} of a table with two columns; ``value`` is a pattern."""
    pattern = re.compile(rf"([0-9]{{1,18}})\s+({value})")
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8, expected {expected}; copy the file again") from None
    table: dict[int, tuple[int, str]] = {}
    for line, row in enumerate(text.split("\n"), 1):
        if not row.strip():
            continue
        match = pattern.fullmatch(row.strip())
        if match is None:
            raise UserError(f"{path}:{line}: found {row.strip()[:80]!r}, expected {expected}")
        image = int(match[1])
        if image in table:
            raise UserError(f"{path}:{line}: image id {image} again, after line {table[image][0]}")
        table[image] = line, match[2]
    return table


def _read_cars(files: Mapping[str, Path]) -> Parts:
    (train, *_), (test, *_) = CARS_TABLES
    parts = _read_matrix(files[train], "cars_train"), _read_matrix(files[test], "cars_test")
    _require_images(files[train], parts[0])
    _require_images(files[test], parts[1])
    return parts


def _read_matrix(path: Path, folder: str) -> list[Entry]:
    """The records of a MATLAB file's struct array ``annotations``."""
    from scipy.io import loadmat

    try:
        annotations = loadmat(path)["annotations"]
    except KeyError:
        raise UserError(f"{path}: no struct array annotations, expected one; copy the file again") from None
    except Exception as error:  # of a damaged file: of any kind, from scipy's reader, struct or zlib
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not a readable MATLAB file ({reason}); copy it again") from None
    fields = annotations.dtype.names or ()
    if not {"class", "fname"} <= set(fields):
        found = ", ".join(fields) or "none"
        raise UserError(
            f"{path}: annotations have the fields {found}; expected class and fname, so for test images "
            "cars_test_annos_withlabels.mat"
        )
    entries = []
    for index, record in enumerate(annotations.ravel(), 1):
        number, name = record["class"], record["fname"]
        place = f"{path}: annotation {index}"
        if number.size != 1 or number.dtype.kind not in "ui":
            raise UserError(f"{place}: class {_short(number)}, expected one whole number")
        if name.size != 1 or name.dtype.kind != "U":
            raise UserError(f"{place}: fname {_short(name)}, expected one file name")
        entries.append(Entry(f"{folder}/{name.item()}", int(number.item()), place))
    return entries


def _short(value: Any) -> str:
    return repr(value.tolist())[:80]


class InatImage(BaseModel):
    """One entry of a listing's ``images``."""

    model_config = ConfigDict(strict=True)
    id: int
    file_name: str


class InatAnnotation(BaseModel):
    """One entry of a listing's ``annotations``: an image's class."""

    model_config = ConfigDict(strict=True)
    image_id: int
    category_id: int


class InatListing(BaseModel):
    """What is needed of ``train2019.json`` and ``val2019.json``."""

    images: list[InatImage]
    annotations: list[InatAnnotation]


def _read_inat(files: Mapping[str, Path]) -> Parts:
    train, test = (files[name] for name in INAT_LISTINGS)
    return _read_listing(train), _read_listing(test)


def _read_listing(path: Path) -> list[Entry]:
    try:
        listing = InatListing.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        place = f"{path}: {where}" if where else f"{path}"
        raise UserError(
            f"{place}: {first['msg']}; expected images (id, file_name) and annotations "
            "(image_id, category_id)"
        ) from None
    names: dict[int, str] = {}
    for index, image in enumerate(listing.images):
        if image.id in names:
            raise UserError(f"{path}: images.{index}: image id {image.id} again, expected it once")
        names[image.id] = image.file_name
    entries: dict[int, Entry] = {}
    for index, annotation in enumerate(listing.annotations):
        place, image_id = f"{path}: annotations.{index}", annotation.image_id
        if image_id not in names:
            raise UserError(f"{place}: image id {image_id}, expected one of those in images")
        if image_id in entries:
            raise UserError(f"{place}: image id {image_id} again, expected one class per image")
        entries[image_id] = Entry(names[image_id], annotation.category_id, place)
    for index, image in enumerate(listing.images):
        if image.id not in entries:
            raise UserError(f"{path}: images.{index}: image id {image.id} has no annotation; add its class")
    entries_in_order = [entries[image_id] for image_id in names]
    _require_images(path, entries_in_order)
    return entries_in_order


def _require_images(path: Path, *parts: Sequence[Entry]) -> None:
    if not all(parts):
        raise UserError(f"{path}: a part without images, expected training and test images; copy it again")


LAYOUTS = {
    "cub200": Layout(
        "CUB-200-2011",
        "CUB_200_2011",
        (*((name,) for name in CUB_TABLES), ("images",)),
        "https://www.vision.caltech.edu/datasets/cub_200_2011",
        "images",
        _read_cub,
    ),
    "cars": Layout(
        "Stanford Cars",
        "stanford_cars",
        (*CARS_TABLES, ("cars_train",), ("cars_test",)),
        "https://github.com/pytorch/vision/issues/7545",
        ".",
        _read_cars,
    ),
    "inat2019": Layout(
        "iNaturalist 2019",
        None,
        (*((name,) for name in INAT_LISTINGS), ("train_val2019",)),
        "https://github.com/visipedia/inat_comp/tree/master/2019",
        ".",
        _read_inat,
    ),
}
