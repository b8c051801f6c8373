from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mlomae.data.dataset import Dataset, Source
from mlomae.data.faults import BadSample
from mlomae.data.sources import open_dataset
from mlomae.data.splits import make_splits
from mlomae.errors import UserError
from mlomae.sections import DataConfig

OpenTable = Callable[..., Dataset]


@pytest.fixture
def open_table(tmp_path: Path) -> OpenTable:
    """Writes a table into ``tmp_path`` and opens it."""

    def open_file(text: str | bytes, encoding: str = "utf-8") -> Dataset:
        path = tmp_path / "images.csv"
        path.write_bytes(text if isinstance(text, bytes) else text.encode(encoding))
        return open_dataset(DataConfig(dataset="csv", path=path), 3)

    return open_file


def labels_of(source: Source) -> list[int] | None:
    return None if source.labels is None else source.labels.tolist()


def test_a_table_with_everything(tmp_path: Path, open_table: OpenTable) -> None:
    (tmp_path / "deep").mkdir()
    outside = tmp_path.parent / f"{tmp_path.name}-outside.png"
    for number, path in enumerate((tmp_path / "deep" / "a.png", tmp_path / "b, c.png", outside)):
        path.write_bytes(bytes([number]))
    dataset = open_table(
        "id,Split, FilePath ,Class\n"
        "7,train,./deep//a.png,dog\n"
        '8,TRAIN,"b, c.png",cat\n'
        "\n"
        f"9,test,{outside},dog\n"
    )
    assert list(dataset.train.keys) == ["./deep//a.png", "b, c.png"]
    assert labels_of(dataset.train) == [1, 0] and dataset.num_classes == 2
    assert dataset.class_names == ("cat", "dog")
    assert [dataset.train.content(index) for index in range(2)] == [b"\0", b"\1"]
    assert dataset.train.stack is None and len(dataset.train) == 2
    assert dataset.open_test is not None
    test = dataset.open_test()
    assert list(test.keys) == [outside.as_posix()]
    assert labels_of(test) == [1] and test.content(0) == b"\2"


@pytest.mark.parametrize("name", ["path", "image", "file", "filename", "FILEPATH"])
def test_paths_alone(open_table: OpenTable, name: str) -> None:
    dataset = open_table(f"{name}\na.png\nb.png\n")
    assert list(dataset.train.keys) == ["a.png", "b.png"]
    assert dataset.train.labels is None and dataset.num_classes is None and dataset.open_test is None


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_dialects(open_table: OpenTable, delimiter: str, encoding: str, newline: str) -> None:
    rows = [["path", "target", "size, in; kB"], ["é.png", "0", "1"], ["b.png", "1", "2"]]
    rows[0][2] = f'"{rows[0][2]}"'
    dataset = open_table(newline.join(delimiter.join(row) for row in rows), encoding)
    assert list(dataset.train.keys) == ["é.png", "b.png"] and labels_of(dataset.train) == [0, 1]


def test_known_columns_tell_the_delimiter(open_table: OpenTable) -> None:
    dataset = open_table("path;size, mean, in kB;y\na.png;1;0\nb.png;2;1\n")
    assert list(dataset.train.keys) == ["a.png", "b.png"] and labels_of(dataset.train) == [0, 1]


def test_backslashes_separate_folders(tmp_path: Path, open_table: OpenTable) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.png").write_bytes(b"content")
    dataset = open_table("path\ndeep\\a.png\n")
    assert dataset.train.keys[0] == "deep/a.png" and dataset.train.content(0) == b"content"


@pytest.mark.parametrize(
    "cells, expected, num_classes",
    [
        (["2", "0", "1", "2"], [2, 0, 1, 2], 3),
        ([str(number) for number in range(11)], list(range(11)), 11),
        (["1.0", "", "0.0", "1."], [1, -1, 0, 1], 2),  # as data frames write a column with gaps
        (["10", "9", "b"], [0, 1, 2], 3),  # names: sorted as such
        (["cat", " ", "ant", " cat "], [1, -1, 0, 1], 2),
        (["1.5", "0"], [1, 0], 2),
        (["", ""], None, None),
    ],
)
def test_labels(
    open_table: OpenTable, cells: list[str], expected: list[int] | None, num_classes: int | None
) -> None:
    rows = "".join(f"{number}.png,{cell}\n" for number, cell in enumerate(cells))
    dataset = open_table(f"path,y\n{rows}")
    assert labels_of(dataset.train) == expected and dataset.num_classes == num_classes


def test_a_name_in_another_part_makes_all_labels_names(open_table: OpenTable) -> None:
    dataset = open_table("path,y,set\na.png,7,train\nb.png,5,train\nc.png,7,test\nd.png,x,val\n")
    assert labels_of(dataset.train) == [1, 0]
    assert dataset.open_test is not None and labels_of(dataset.open_test()) == [1]


@pytest.mark.parametrize("name", ["val", "valid", "Validation"])
def test_validation_rows_test_only_where_there_is_no_test(open_table: OpenTable, name: str) -> None:
    text = f"path,split\na.png,train\nb.png,{name}\n"
    dataset = open_table(text)
    assert dataset.open_test is not None and list(dataset.open_test().keys) == ["b.png"]
    dataset = open_table(f"{text}c.png,test\n")
    assert dataset.open_test is not None and list(dataset.open_test().keys) == ["c.png"]
    assert list(dataset.train.keys) == ["a.png"]


def test_a_table_of_the_training_part_is_split(open_table: OpenTable) -> None:
    dataset = open_table("path,split\n" + "".join(f"{number}.png,train\n" for number in range(200)))
    assert dataset.open_test is None and dataset.files is None
    test = make_splits(dataset, DataConfig(test_fraction=0.5)).test
    assert test is not None and 70 < len(test) < 130


@pytest.mark.parametrize(
    "text, message",
    [
        ("", r"no rows, expected a header and a row per image"),
        ("\n\n", r"no rows, expected a header"),
        ("path,label\n,\n", r"no rows, expected a header"),
        ("x.png,cat\ny.png,dog\n", r"row 1 has the columns 'x\.png, cat'; expected one called path, image"),
        ("z" * 200_000, r"row 1 is no CSV \(field larger than .+\)"),
        ("path,image\na,b\n", r"row 1 has two columns of the path, 'path' and 'image'; rename one"),
        ("path,Label,class\na,b,c\n", r"row 1 has two columns of the label, 'Label' and 'class'; rename"),
        ("path,y\na.png,0\n\nb,c.png,1\n", r"row 4 has 3 cells, but the header has 2; quote cells"),
        ("path,y\na.png\n", r"row 2 has 1 cells, but the header has 2"),
        ('path\na.png\n"b.png\nc.png\n', r"row 3 is no CSV \(.+\); correct its quotes"),
        ("path,y\n,1\n", r"row 2 has the path '', expected an image file"),
        ("path\na\0.png\n", r"row 2 has the path 'a\\x00\.png', expected"),
        (
            "path,split\na.png,train\nb.png,dev\n",
            r"row 3 has the split 'dev', expected one of train, test, val",
        ),
        ("path,split\na.png,\n", r"row 2 has the split '', expected one of train"),
        ("path,split\na.png,test\n", r"no row of split train; mark the training images"),
        (
            "path\na.png\nb.png\n./a.png\n",
            r"row 4 lists \./a\.png, which row 2 has already; list each image once",
        ),
        ("path,y\na.png,0\nx/../a.png,1\n", r"row 3 lists x/\.\./a\.png, which row 2 has already"),
        (
            "path,split\na.png,train\na.png,test\n",
            r"row 3 lists a\.png, which row 2 has already as train, and here as test; list each",
        ),
        (
            "path,split\na.png,train\nc.png,test\nb.png,val\nb.png,val\n",
            r"row 5 lists b\.png, which row 4 has already;",
        ),
        (
            "path,y\na.png,0\nb.png,2\n",
            r"row 3 has the label 2, expected 0 to 1 as there are 2 classes in tr",
        ),
        ("path,y\na.png,0\nb.png,-1\n", r"row 3 has the label -1, expected 0 to 1"),
        (
            "path,y,split\na.png,ant,train\nb.png,bee,train\nc.png,cat,test\n",
            r"row 4 of split test has the label 'cat', expected one of the training rows' labels: ant, bee$",
        ),
        ("path,y,split\na.png,0,train\nb.png,1,val\n", r"row 3 of split val has the label '1', expected one"),
        ("path,y,split\na.png,0,train\nb.png,,test\n", r"row 3 of split test has no label, expected one of"),
        (
            "path,y,split\na.png,,train\nb.png,0,test\n",
            r"row 3 of split test has the label '0', expected none, as in the training rows",
        ),
    ],
)
def test_unusable_tables(open_table: OpenTable, text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"images.csv: {message}") as caught:
        open_table(text)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_another_encoding_is_named_with_its_row(open_table: OpenTable) -> None:
    message = r"images\.csv: row 3 has the byte 0xe9, which is not UTF-8; save the table as UTF-8"
    for start in (b"", b"\xef\xbb\xbf"):
        with pytest.raises(UserError, match=message):
            open_table(start + "path\na.png\né.png\n".encode("latin-1"))
    with pytest.raises(UserError, match=r"row 1 has the byte 0xff, which is not UTF-8"):
        open_table("path\na.png\n", encoding="utf-16")


def test_missing_images_are_met_when_they_are_read(open_table: OpenTable, tmp_path: Path) -> None:
    for name in ("a.png", "t.png"):
        (tmp_path / name).write_bytes(name.encode())
    rows = "".join(f"{number}.png,train\n" for number in range(40))
    dataset = open_table(f"path,split\na.png,train\n{rows}t.png,test\ngone.png,test\n")
    make_splits(dataset, DataConfig())
    assert dataset.open_test is not None
    test = dataset.open_test()
    assert test.content(0) == b"t.png"
    for source, index in ((dataset.train, 1), (test, 1)):
        with pytest.raises(BadSample, match="cannot be read") as caught:
            source.content(index)
        assert caught.value.kind == "unreadable"
        assert caught.value.reason == "cannot be read (No such file or directory)"


@pytest.mark.parametrize("duplicate", [os.symlink, os.link])
def test_a_test_image_that_links_to_a_training_image_is_refused(
    open_table: OpenTable, tmp_path: Path, duplicate: Callable[[Path, Path], None]
) -> None:
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(bytes([number]))
    rows = "".join(f"{number}.png,train\n" for number in range(40))
    shutil.copy(tmp_path / "0.png", tmp_path / "copy.png")
    make_splits(open_table(f"path,split\n{rows}copy.png,test\n"), DataConfig())
    duplicate(tmp_path / "0.png", tmp_path / "linked.png")
    with pytest.raises(UserError, match=r"test file .*linked\.png is the training file .*0\.png; keep"):
        make_splits(open_table(f"path,split\n{rows}linked.png,test\n"), DataConfig())
