"""Tables of image files (CSV): a row per image, with a path and perhaps a label and a part."""

from __future__ import annotations

import csv
import io
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mlomae.data.dataset import STATISTICS, Dataset, PartFiles
from mlomae.data.decoding import MODES
from mlomae.data.folder import FilesSource
from mlomae.errors import UserError

COLUMNS = {
    "path": ("path", "image", "file", "filename", "filepath"),
    "label": ("label", "class", "target", "y"),
    "split": ("split", "part", "set"),
}
PARTS = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
DELIMITERS = ",;\t"

# Data frames write class numbers as 3.0 where other rows of the column are empty.
_NUMBER = re.compile(r"-?[0-9]{1,18}(\.0*)?")


@dataclass(frozen=True, slots=True)
class Row:
    """One image; ``number`` counts as a spreadsheet does, the header is row 1."""

    number: int
    key: str
    label: str  # empty: none
    part: str


def open_csv(path: Path, in_chans: int) -> Dataset:
    """Opens a table of image files; no image is opened.

    The header names the columns: path | image | file | filename | filepath; label | class | target | y
    (optional); split | part | set (optional), in any case. Cells are separated by commas, semicolons or tabs.
    A path is relative to the folder of the table, or absolute; as written, with forward slashes, it is the
    sample's key. Labels are class numbers 0 to n - 1 or, as soon as one is no whole number, names, which are
    numbered in sorted order; an empty cell means that the image has none. A split is train, test or
    val (valid, validation). Rows of val are the test part where no row is of test; beside rows of test they
    are left out of everything, for the user's own model selection.

    Raises:
        UserError: the table cannot be read, lists an image twice, or has a cell that is not as above.
    """
    parts: defaultdict[str, list[Row]] = defaultdict(list)
    for row in _distinct(path, _read_rows(path)):
        parts[row.part].append(row)
    if not parts:
        raise UserError(f"{path}: no rows, expected a header and a row per image")
    if not parts["train"]:
        raise UserError(f"{path}: no row of split train; mark the training images as train")
    test_rows = parts["test"] or parts["val"]
    numbers = _number_labels(path, parts)
    num_classes = len(set(numbers.values())) or None
    train = _source(path.parent, parts["train"], numbers)
    statistics = STATISTICS[MODES[in_chans]]
    class_names = tuple(sorted(numbers, key=numbers.__getitem__)) if num_classes == len(numbers) else None
    if not test_rows:
        return Dataset(train, num_classes, *statistics, class_names=class_names)
    _verify_test_labels(path, test_rows, numbers)
    test = _source(path.parent, test_rows, numbers)
    files = PartFiles(path.parent, train.keys), PartFiles(path.parent, test.keys)
    return Dataset(
        train, num_classes, *statistics, open_test=lambda: test, files=files, class_names=class_names
    )


def _read_rows(path: Path) -> Iterator[Row]:
    text = _read_text(path)
    records = _records(path, text, _sniff(text))
    _, header = next(records, (0, []))
    columns = _find_columns(path, header) if header else {}
    for number, record in records:
        if len(record) != len(header):
            found = f"row {number} has {len(record)} cells, but the header has {len(header)}"
            raise UserError(f"{path}: {found}; quote cells that contain the delimiter")
        cells = {role: record[column].strip() for role, column in columns.items()}
        key = cells["path"].replace("\\", "/")
        if not key or "\0" in key:
            raise UserError(f"{path}: row {number} has the path {cells['path']!r}, expected an image file")
        split = cells.get("split", "train")
        if split.lower() not in PARTS:
            raise UserError(
                f"{path}: row {number} has the split {split!r}, expected one of {', '.join(PARTS)}"
            )
        yield Row(number, key, cells.get("label", ""), PARTS[split.lower()])


def _read_text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        row = error.object.count(b"\n", 0, error.start) + 1
        found = f"row {row} has the byte {error.object[error.start]:#04x}"
        raise UserError(f"{path}: {found}, which is not UTF-8; save the table as UTF-8") from None


def _sniff(text: str) -> str:
    """The delimiter that makes most of the header's known columns, then most of its columns."""
    header = re.split(r"[\r\n]", text.lstrip("\r\n"), maxsplit=1)[0]

    def score(delimiter: str) -> tuple[int, int]:
        cells = header.split(delimiter)
        return sum(_role(cell.strip(' "')) is not None for cell in cells), len(cells)

    return max(DELIMITERS, key=score)


def _records(path: Path, text: str, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    """Numbered rows of cells, without blank ones."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    number = 0
    try:
        for number, record in enumerate(reader, 1):
            if any(cell.strip() for cell in record):
                yield number, record
    except csv.Error as error:
        raise UserError(f"{path}: row {number + 1} is no CSV ({error}); correct its quotes") from None


def _role(cell: str) -> str | None:
    name = cell.strip().lower()
    return next((role for role, names in COLUMNS.items() if name in names), None)


def _find_columns(path: Path, header: Sequence[str]) -> dict[str, int]:
    """{role: column} of the roles that the header has."""
    columns: dict[str, int] = {}
    for column, cell in enumerate(header):
        role = _role(cell)
        if role in columns:
            both = f"{header[columns[role]].strip()!r} and {cell.strip()!r}"
            raise UserError(f"{path}: row 1 has two columns of the {role}, {both}; rename one of them")
        if role is not None:
            columns[role] = column
    if "path" not in columns:
        found = ", ".join(cell.strip() for cell in header)[:80]
        raise UserError(
            f"{path}: row 1 has the columns {found!r}; expected one called {', '.join(COLUMNS['path'])}"
        )
    return columns


def _distinct(path: Path, rows: Iterator[Row]) -> Iterator[Row]:
    """The same rows, of which no two are the same file by their paths."""
    first: dict[str, Row] = {}
    folder = str(path.parent)
    for row in rows:
        known = first.setdefault(os.path.normpath(os.path.join(folder, row.key)), row)
        if known is not row:
            parts = "" if known.part == row.part else f" as {known.part}, and here as {row.part}"
            raise UserError(
                f"{path}: row {row.number} lists {row.key}, which row {known.number} has already{parts}; "
                "list each image once"
            )
        yield row


def _number_labels(path: Path, parts: Mapping[str, Sequence[Row]]) -> dict[str, int]:
    """{label as written: class number} of the classes that training rows have."""
    texts = {row.label for rows in parts.values() for row in rows if row.label}
    numeric = all(_NUMBER.fullmatch(text) for text in texts)
    names = {text: str(int(text.partition(".")[0])) if numeric else text for text in texts}
    classes = {names[row.label] for row in parts["train"] if row.label}
    numbers = {name: number for number, name in enumerate(sorted(classes))}
    if numeric:
        for row in parts["train"]:
            if row.label and not 0 <= int(names[row.label]) < len(classes):
                raise UserError(
                    f"{path}: row {row.number} has the label {row.label}, expected 0 to {len(classes) - 1} "
                    f"as there are {len(classes)} classes in training; renumber them, or use names"
                )
        numbers = {name: int(name) for name in classes}
    return {text: numbers[name] for text, name in names.items() if name in numbers}


def _verify_test_labels(path: Path, rows: Sequence[Row], numbers: Mapping[str, int]) -> None:
    for row in rows:
        if row.label not in numbers and (row.label or numbers):
            found = f"the label {row.label!r}" if row.label else "no label"
            known = ", ".join(sorted(numbers))[:80]
            right = (
                f"one of the training rows' labels: {known}" if numbers else "none, as in the training rows"
            )
            raise UserError(f"{path}: row {row.number} of split {row.part} has {found}, expected {right}")


def _source(root: Path, rows: Sequence[Row], numbers: Mapping[str, int]) -> FilesSource:
    labels = torch.tensor([numbers.get(row.label, -1) for row in rows]) if numbers else None
    return FilesSource(root, [row.key for row in rows], labels)
