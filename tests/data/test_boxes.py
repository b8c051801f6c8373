"""Reading of images with boxes: what comes out of a COCO file, and which files are refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mlomae.data.boxes import BoxesConfig, BoxSource, open_boxes
from mlomae.data.faults import BadSample
from mlomae.errors import UserError
from tests.data.made_boxes import CLASSES, make_boxes

BCCD = Path(__file__).resolve().parents[3] / "shared" / "data" / "bccd"
Document = dict[str, Any]


def read(root: Path, split: str = "train") -> Document:
    document: Document = json.loads((root / "annotations" / f"instances_{split}.json").read_text())
    return document


def edit(root: Path, change: Callable[[Document], Any], split: str = "train") -> None:
    document = read(root, split)
    change(document)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(document))


def train_of(root: Path) -> BoxSource:
    return open_boxes(BoxesConfig(path=str(root)))[0]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_boxes(tmp_path / "set", {"train": 10, "test": 4})


def test_boxes_lie_on_what_they_name(root: Path) -> None:
    train, test = open_boxes(BoxesConfig(path=str(root)))

    assert (len(train), len(test)) == (10, 4)
    # In ascending order of the ids, not of the file.
    assert train.categories == test.categories == ("blue", "red")
    seen = 0
    for index in range(len(train)):
        image, objects = train.image(index, 3).float(), train.objects(index)
        for box, label in list(zip(objects.boxes.tolist(), objects.labels.tolist(), strict=True))[-1:]:
            left, top, right, bottom = map(int, box)  # the last one lies on top
            mean = image[:, top:bottom, left:right].mean(dim=(1, 2))
            torch.testing.assert_close(mean, torch.tensor(CLASSES[train.categories[label - 1]]).float())
            assert objects.areas[-1] == (right - left) * (bottom - top)
            seen += 1
    assert seen == 9
    assert len(train.objects(7).labels) == 0  # an image without any is one of the set


def test_what_is_left_out_has_a_default(root: Path) -> None:
    def strip(document: Document) -> None:
        for annotation in document["annotations"]:
            del annotation["area"], annotation["iscrowd"]

    before = train_of(root).objects(1)
    edit(root, strip)
    after = train_of(root).objects(1)

    assert torch.equal(before.areas, after.areas)
    assert not after.crowd.any()


def test_a_box_is_cut_to_its_image_and_an_empty_one_left_out(root: Path) -> None:
    def shift(document: Document) -> None:
        document["annotations"][0]["bbox"] = [-0.75, 0, 20, 64.9]
        document["annotations"][1] |= {"image_id": 100, "bbox": [5, 5, 0, 9]}
        document["annotations"][2] |= {"image_id": 100, "bbox": [64.5, 5, 0.5, 9]}

    edit(root, shift)
    train = train_of(root)

    assert train.objects(0).boxes.tolist() == [[0, 0, 19.25, 64]]
    assert [(fault.key, fault.kind) for fault in train.faults] == [("000.png", "label")] * 2
    assert "annotation 2" in train.faults[0].reason


def test_an_image_of_another_size_is_a_bad_sample(root: Path) -> None:
    Image.fromarray(np.zeros((64, 48, 3), np.uint8)).save(root / "train" / "001.png")

    with pytest.raises(BadSample) as caught:
        train_of(root).image(1, 3)
    assert caught.value.reason == "48 x 64 pixels, but 64 x 48 by its annotations"


def _set(where: str, index: int, **values: Any) -> Callable[[Document], Any]:
    return lambda document: document[where][index].update(values)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("categories"), "instances_train.json: categories: Field required"),
        (lambda d: d["images"][2].pop("width"), r"images\[2\]\.width: Field required"),
        (_set("annotations", 1, bbox=[1, 2, 3]), r"annotations\[1\]\.bbox"),
        (_set("annotations", 1, bbox=[1, 2, 3, float("nan")]), r"annotations\[1\]\.bbox\[3\]"),
        (_set("images", 0, file_name="lost.png"), "1 of its 10 images are not in .*, such as lost.png"),
        (_set("images", 0, file_name="../test/000.png"), "leaves the folder"),
        (_set("images", 0, id=101), "image id 101 is there 2 times"),
        (_set("images", 0, file_name="001.png"), "file name '001.png' is there 2 times"),
        (_set("categories", 0, id=3), "category id 3 is there 2 times"),
        (_set("categories", 0, name="blue"), "category name 'blue' is there 2 times"),
        (_set("annotations", 0, image_id=9), r"annotation 1 \(image 9, .* is of an image that is not listed"),
        (_set("annotations", 0, category_id=4), "annotation 1 .* of category 4, which is not listed"),
        (_set("annotations", 0, bbox=[9, 9, -3, 5]), r"box \[9.0, 9.0, -3.0, 5.0\]\) has a negative width"),
        (_set("annotations", 0, bbox=[50, 9, 15.5, 5]), "annotation 1 .* leaves its image of 64 x 64 pixels"),
        (_set("annotations", 0, bbox=[9, -1.5, 5, 5]), "annotation 1 .* leaves its image"),
        (lambda d: d["annotations"].clear(), "its list of annotations is empty"),
        (lambda d: d["images"].clear(), "its list of images is empty"),
        (lambda d: d["categories"].pop(), "annotation .* is of category 3, which is not listed"),
        (lambda d: d["categories"].append({"id": 9, "name": "x"}), "data.test: test has the categories"),
    ],
)
def test_refused(change: Callable[[Document], Any], message: str, root: Path) -> None:
    edit(root, change)
    with pytest.raises(UserError, match=message) as caught:
        train_of(root)
    assert "\n" not in str(caught.value)


def test_missing_files(root: Path) -> None:
    (root / "annotations" / "instances_test.json").write_text("{")
    with pytest.raises(UserError, match=r"instances_test.json: Invalid JSON"):
        train_of(root)
    (root / "annotations" / "instances_test.json").unlink()
    with pytest.raises(UserError, match=r"data.path: .*instances_test.json cannot be read"):
        train_of(root)
    (root / "train").rename(root / "other")
    with pytest.raises(UserError, match=r"data.path: .*train cannot be read .* images of instances_train"):
        train_of(root)


def test_blood_cells() -> None:
    if not BCCD.is_dir():
        pytest.skip(f"needs the BCCD photographs in {BCCD}")
    train, test = open_boxes(BoxesConfig(path=str(BCCD)))

    assert (len(train), len(test)) == (205, 72)
    assert train.categories == ("Platelets", "RBC", "WBC")
    labels = torch.cat([train.objects(index).labels for index in range(len(train))])
    assert labels.bincount().tolist() == [0, 209, 2381, 214]
    assert train.image(0, 3).shape == (3, 480, 640)
    # White cells are the large ones, platelets the small ones.
    areas = torch.cat([train.objects(index).areas for index in range(len(train))])
    means = [float(areas[labels == label].mean()) for label in (1, 2, 3)]
    assert means == sorted(means)
