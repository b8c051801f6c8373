"""Fine-grained sets in the layouts of their authors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.io import savemat
from torch import Tensor

from mlomae.config import Config
from mlomae.data.dataset import STATISTICS, Dataset, Source
from mlomae.data.faults import BadSample
from mlomae.data.loader import LevelLoaders
from mlomae.data.sources import open_dataset
from mlomae.errors import UserError
from mlomae.sections import DataConfig
from tests.data.pictures import by_pillow

SETS = ("cub200", "cars", "inat2019")
CLASSES, TRAIN, TEST = 3, 48, 9
# Where each image of the sets lies, by number; numbers from TRAIN on are of the test part.
PLACES: dict[str, Callable[[int], str]] = {
    "cub200": lambda n: f"images/{n % CLASSES + 1:03d}.Bird/Bird {n:04d}.png",
    "cars": lambda n: f"{_part(n)}/{n % TRAIN + 1:05d}.png",
    "inat2019": lambda n: f"train_val2019/Birds/{n % CLASSES}/{n:04d}.png",
}
NUMBERS = range(TRAIN + TEST)


def _part(number: int) -> str:
    return "cars_train" if number < TRAIN else "cars_test"


def _write_tables(name: str, root: Path) -> None:
    """The files beside the images. Image n is of class n % CLASSES; CUB's ids go down."""
    if name == "cub200":
        ids = [(2 * (TRAIN + TEST) - n, n) for n in NUMBERS]
        tables = {
            "images.txt": [f"{i} {PLACES[name](n).removeprefix('images/')}" for i, n in ids],
            "image_class_labels.txt": [f"{i} {n % CLASSES + 1}" for i, n in reversed(ids)],
            "train_test_split.txt": [f"{i} {int(n < TRAIN)}" for i, n in ids],
        }
        for file, lines in tables.items():
            (root / file).write_text("".join(line + "\n" for line in lines))
    elif name == "cars":
        (root / "devkit").mkdir()
        write_annotations(root / "devkit" / "cars_train_annos.mat", range(TRAIN))
        write_annotations(root / "cars_test_annos_withlabels.mat", range(TRAIN, TRAIN + TEST))
    else:
        for file, part in (("train2019.json", range(TRAIN)), ("val2019.json", range(TRAIN, TRAIN + TEST))):
            images = [{"id": 1000 + n, "file_name": PLACES[name](n), "width": 9} for n in part]
            notes = [{"id": n, "image_id": 1000 + n, "category_id": n % CLASSES} for n in reversed(part)]
            (root / file).write_text(json.dumps({"info": {}, "images": images, "annotations": notes}))


def write_annotations(path: Path, part: range, **changes: Any) -> None:
    """A struct array as MATLAB writes it: 1 x N, every field a matrix; ``changes`` are of the first one."""
    fields = [("bbox_x1", object), ("class", object), ("fname", object)]
    records = np.zeros((1, len(part)), dtype=fields)
    for column, n in enumerate(part):
        record = {
            "bbox_x1": np.uint8(1),
            "class": np.uint8(n % CLASSES + 1),
            "fname": f"{n % TRAIN + 1:05d}.png",
        }
        records[0, column] = tuple({**record, **(changes if column == 0 else {})}.values())
    savemat(path, {"annotations": records})


@pytest.fixture
def make_set(tmp_path: Path, encode: Callable[..., bytes]) -> Callable[[str], Path]:
    """Writes a set; its image n holds noise from the seed n."""

    def make(name: str) -> Path:
        root = tmp_path / {"cub200": "CUB_200_2011", "cars": "stanford_cars", "inat2019": "inat"}[name]
        for n in NUMBERS:
            path = root / PLACES[name](n)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(n))
        _write_tables(name, root)
        return root

    return make


def open_set(name: Any, path: Path, in_chans: int = 3) -> Dataset:
    return open_dataset(DataConfig(dataset=name, path=path), in_chans)


def assert_refused(name: str, root: Path, start: str) -> None:
    """With one line that begins so."""
    with pytest.raises(UserError) as caught:
        open_set(name, root)
    assert str(caught.value).startswith(start) and "\n" not in str(caught.value)


def assert_holds(source: Source, numbers: range, encode: Callable[..., bytes]) -> None:
    """Every image of ``numbers``, each with its class."""
    assert source.labels is not None and source.labels.dtype == torch.int64
    found = {source.content(row): label for row, label in enumerate(source.labels.tolist())}
    assert found == {encode(n): n % CLASSES for n in numbers}
    assert len(source) == len(numbers) == len(set(source.keys))


@pytest.mark.parametrize("name", SETS)
def test_parts_and_labels_are_the_authors(
    make_set: Callable[[str], Path], encode: Callable[..., bytes], name: str
) -> None:
    root = make_set(name)
    dataset = open_set(name, root)
    assert dataset.num_classes == CLASSES
    assert (dataset.mean, dataset.std) == STATISTICS["RGB"]
    assert open_set(name, root, in_chans=1).mean == STATISTICS["L"][0]
    assert dataset.open_test is not None and dataset.files is not None
    test = dataset.open_test()
    assert_holds(dataset.train, range(TRAIN), encode)
    assert_holds(test, range(TRAIN, TRAIN + TEST), encode)
    assert not {*dataset.train.keys} & {*test.keys}
    for files, source in zip(dataset.files, (dataset.train, test), strict=True):
        assert (files.root / files.names[4]).read_bytes() == source.content(4)


@pytest.mark.parametrize("name", SETS)
def test_levels_read_disjoint_images_with_their_labels(
    make_set: Callable[[str], Path],
    make_config: Callable[..., Config],
    encode: Callable[..., bytes],
    name: str,
) -> None:
    config = make_config(
        data={"dataset": name, "path": make_set(name)}, model={"in_chans": 3}, mask={"batch_size": 4}
    )
    loaders = LevelLoaders(config)
    assert loaders.num_classes == CLASSES and loaders.sizes["test"] == TEST
    numbers = {by_pillow(encode(n)).numpy().tobytes(): n for n in NUMBERS}
    mean, std = (torch.tensor(STATISTICS["RGB"][row])[:, None, None] for row in (0, 1))

    def number(image: Tensor) -> int:
        return numbers[((image * std + mean) * 255).round().to(torch.uint8).numpy().tobytes()]

    members = {}
    for part in ("train", "heldout", "test"):
        read = [
            (number(image), label)
            for batch in loaders.evaluation(part)  # type: ignore[arg-type]
            for image, label in zip(batch.images, batch.labels.tolist(), strict=True)  # type: ignore[union-attr]
        ]
        assert all(label == n % CLASSES for n, label in read)
        members[part] = {n for n, _ in read}
        assert len(members[part]) == len(read) > 0
    assert members["train"] | members["heldout"] == set(range(TRAIN))
    assert not members["train"] & members["heldout"]
    assert members["test"] == set(range(TRAIN, TRAIN + TEST))


@pytest.mark.parametrize("name", ["cub200", "cars"])
def test_the_folder_around_a_set_will_do(make_set: Callable[[str], Path], name: str) -> None:
    root = make_set(name)
    inside, around = open_set(name, root), open_set(name, root.parent)
    # Keys decide who is held out: they must not depend on how the set was named.
    assert inside.train.keys == around.train.keys and inside.train.content(3) == around.train.content(3)


def test_annotations_of_cars_lie_beside_the_devkit_or_in_it(make_set: Callable[[str], Path]) -> None:
    root = make_set("cars")
    keys = open_set("cars", root).train.keys
    (root / "cars_test_annos_withlabels.mat").rename(root / "devkit" / "cars_test_annos_withlabels.mat")
    (root / "devkit" / "cars_train_annos.mat").rename(root / "cars_train_annos.mat")
    assert open_set("cars", root).train.keys == keys


@pytest.mark.parametrize("name", SETS)
def test_an_image_that_is_missing_is_a_bad_sample(make_set: Callable[[str], Path], name: str) -> None:
    root = make_set(name)
    (root / PLACES[name](5)).unlink()
    dataset = open_set(name, root)
    faults = []
    for row in range(TRAIN):
        try:
            dataset.train.content(row)
        except BadSample as bad:
            faults.append((dataset.train.keys[row], bad.kind))
    assert faults == [(PLACES[name](5).removeprefix("images/"), "unreadable")]


@pytest.mark.parametrize(
    ("name", "file", "missing"),
    [
        *(("cub200", name, name) for name in ("images.txt", "train_test_split.txt", "images")),
        ("cars", "devkit/cars_train_annos.mat", "devkit/cars_train_annos.mat or cars_train_annos.mat"),
        (
            "cars",
            "cars_test_annos_withlabels.mat",
            "cars_test_annos_withlabels.mat or devkit/cars_test_annos_w",
        ),
        ("cars", "cars_test", "cars_test"),
        *(("inat2019", name, name) for name in ("train2019.json", "val2019.json", "train_val2019")),
    ],
)
def test_a_missing_file(make_set: Callable[[str], Path], name: str, file: str, missing: str) -> None:
    root = make_set(name)
    (root / file).rename(root.parent / "elsewhere")
    title = {"cub200": "CUB-200-2011", "cars": "Stanford Cars", "inat2019": "iNaturalist 2019"}[name]
    message = (
        rf"^data\.path: no {re.escape(missing)}.* in {root}; unpack {title} there \(expected .*{file}.*\); "
    )
    with pytest.raises(UserError, match=rf"{message}https://\S+ tells where to get it$"):
        open_set(name, root)


@pytest.mark.parametrize("name", SETS)
def test_a_missing_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"data\.path: .*nowhere is not a folder; give the folder"):
        open_set(name, tmp_path / "nowhere")


# Of CUB: image n has the id 114 - n. In images.txt and the split, line n + 1 is of image n, among the labels
# of image 56 - n.
@pytest.mark.parametrize(
    ("file", "line", "text", "expected"),
    [
        ("images", 2, "113", "images.txt:2: found '113', expected an image id and a file name"),
        ("images", 3, "x y.jpg", "images.txt:3: found 'x y.jpg', expected an image id and"),
        ("images", 3, "114 z.png", "images.txt:3: image id 114 again, after line 1"),
        ("images", 1, "7 z.png", "{labels}:57: image id 114, expected one of those in images.txt"),
        ("images", 2, "113 001.Bird/Bird 0000.png", "{labels}:56: lists 001.Bird/Bird 0000.png again"),
        ("labels", 2, "59 -1", "{labels}:2: found '59 -1', expected an image id and a class number"),
        ("labels", 2, "900 1", "{labels}:2: image id 900, expected one of those in images.txt"),
        ("labels", 2, "", "images.txt:56: image id 59 is missing in {labels}; add its line"),
        ("labels", 9, "66 0", "{labels}:9: class 0, expected 1 to 3, because the training images"),
        ("labels", 1, "58 4", "{labels}:1: class 4, expected 1 to 3, because the training images"),
        ("labels", 57, "114 5", "{labels}:57: class 5, expected 1 to 4, because the training images"),
        ("split", 5, "110 2", "{split}:5: found '110 2', expected an image id and 1 (training) or 0"),
        ("split", 5, "1 1", "{split}:5: image id 1, expected one of those in images.txt"),
        ("split", 57, "", "images.txt:57: image id 58 is missing in {split}; add its line"),
        ("split", 2, b"113 \xff", "{split}:2: not UTF-8, expected an image id and 1 (training) or 0"),
    ],
)
def test_a_wrong_line_of_cub(
    make_set: Callable[[str], Path], file: str, line: int, text: str | bytes, expected: str
) -> None:
    names = {"images": "images.txt", "labels": "image_class_labels.txt", "split": "train_test_split.txt"}
    root = make_set("cub200")
    lines = (root / names[file]).read_bytes().split(b"\n")
    lines[line - 1] = text if isinstance(text, bytes) else text.encode()
    (root / names[file]).write_bytes(b"\n".join(lines))
    assert_refused("cub200", root, f"{root}/{expected.format(**names)}")


@pytest.mark.parametrize("column", ["0", "1"])
def test_a_split_of_cub_without_a_part(make_set: Callable[[str], Path], column: str) -> None:
    root = make_set("cub200")
    split = root / "train_test_split.txt"
    split.write_text(re.sub(r" [01]$", f" {column}", split.read_text(), flags=re.MULTILINE))
    assert_refused("cub200", root, f"{split}: a part without images, expected training and test")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"class": np.zeros((0, 0))}, "annotation 1: class [], expected one whole number"),
        ({"class": "two"}, "annotation 1: class ['two'], expected one whole number"),
        ({"class": np.uint8(9)}, "annotation 1: class 9, expected 1 to 4, because the training"),
        ({"class": np.uint8(0)}, "annotation 1: class 0, expected 1 to 4, because the training"),
        ({"fname": np.uint8(7)}, "annotation 1: fname [[7]], expected one file name"),
        ({"fname": ""}, "annotation 1: fname [], expected one file name"),
        (
            {"fname": "00002.png"},
            "annotation 2: lists cars_train/00002.png again, after {path}: annotation 1",
        ),
    ],
)
def test_a_wrong_annotation_of_cars(
    make_set: Callable[[str], Path], changes: dict[str, Any], expected: str
) -> None:
    root = make_set("cars")
    path = root / "devkit" / "cars_train_annos.mat"
    write_annotations(path, range(TRAIN), **changes)
    assert_refused("cars", root, f"{path}: {expected.format(path=path)}")


def test_annotations_of_cars_that_are_others(make_set: Callable[[str], Path]) -> None:
    root = make_set("cars")
    path = root / "cars_test_annos_withlabels.mat"
    write_annotations(path, range(TRAIN, TRAIN + TEST), **{"class": np.uint8(4)})
    assert_refused("cars", root, f"{path}: annotation 1: class 4, expected 1 to 3, because the training")
    write_annotations(path, range(0))
    assert_refused("cars", root, f"{path}: a part without images")
    unlabelled = np.zeros((1, 2), dtype=[("bbox_x1", object), ("fname", object)])
    savemat(path, {"annotations": unlabelled})
    assert_refused(
        "cars", root, f"{path}: annotations have the fields bbox_x1, fname; expected class and fname"
    )
    savemat(path, {"annotations": np.eye(2)})
    assert_refused("cars", root, f"{path}: annotations have the fields none; expected class and fname")
    savemat(path, {"other": np.eye(2)})
    assert_refused("cars", root, f"{path}: no struct array annotations, expected one")


def test_a_matlab_file_that_is_cut_or_overwritten(make_set: Callable[[str], Path]) -> None:
    root = make_set("cars")
    path = root / "devkit" / "cars_train_annos.mat"
    whole = path.read_bytes()
    rng = np.random.default_rng(0)
    contents = [whole[: int(end)] for end in rng.integers(0, len(whole), 30)]
    for _ in range(30):
        start = int(rng.integers(0, len(whole) // 2))
        contents.append(whole[:start] + rng.bytes(64) + whole[start + 64 :])
    refused = 0
    for content in contents:
        path.write_bytes(content)
        try:
            open_set("cars", root)
        except UserError as error:
            assert str(error).startswith(f"{path}: ") and "\n" not in str(error)
            refused += 1
    assert refused > len(contents) / 2  # what is overwritten may be a bounding box


def _set(part: str, index: int, **values: Any) -> Callable[[Any], Any]:
    return lambda tree: tree[part][index].update(values)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda tree: tree.pop("images"), "images: Field required; expected images (id, file_name) and"),
        (lambda tree: tree["images"][3].pop("file_name"), "images.3.file_name: Field required; expected"),
        (lambda tree: tree["annotations"].pop(), "images.0: image id 1000 has no annotation; add its class"),
        (lambda tree: tree.update(images=[], annotations=[]), "a part without images, expected training"),
        (
            _set("annotations", 5, category_id="2"),
            "annotations.5.category_id: Input should be a valid integer;",
        ),
        (_set("annotations", 0, category_id=-1), "annotations.0: class -1, expected 0 to 3, because the"),
        (_set("annotations", 5, image_id=7), "annotations.5: image id 7, expected one of those in images"),
        (_set("annotations", 5, image_id=1047), "annotations.5: image id 1047 again, expected one class"),
        (_set("images", 2, id=1001), "images.2: image id 1001 again, expected it once"),
        (
            _set("images", 2, file_name=PLACES["inat2019"](0)),
            "annotations.45: lists train_val2019/Birds/0/0000.png again, after {path}: annotations.47;",
        ),
    ],
)
def test_a_wrong_listing_of_inat(
    make_set: Callable[[str], Path], change: Callable[[Any], Any], expected: str
) -> None:
    root = make_set("inat2019")
    path = root / "train2019.json"
    tree = json.loads(path.read_text())
    change(tree)
    path.write_text(json.dumps(tree))
    assert_refused("inat2019", root, f"{path}: {expected.format(path=path)}")


def test_a_listing_that_is_cut(make_set: Callable[[str], Path]) -> None:
    root = make_set("inat2019")
    path = root / "val2019.json"
    path.write_text(path.read_text()[:-20])
    assert_refused("inat2019", root, f"{path}: Invalid JSON: ")


def test_one_file_in_both_parts_is_refused(
    make_set: Callable[[str], Path], make_config: Callable[..., Config]
) -> None:
    root = make_set("cars")
    (root / PLACES["cars"](TRAIN)).unlink()
    (root / PLACES["cars"](TRAIN)).hardlink_to(root / PLACES["cars"](0))
    config = make_config(data={"dataset": "cars", "path": root}, model={"in_chans": 3})
    with pytest.raises(UserError, match=r"data\.path: test file .*cars_test/00001\.png is the training file"):
        LevelLoaders(config)
