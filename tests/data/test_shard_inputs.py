"""What shards can be made of."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlomae.errors import UserError
from mlomae.sharding.inputs import open_inputs
from tests.data.made_shards import by_source, create, members, pixels, refused


@pytest.fixture
def classes(tmp_path: Path, fill_folder: Callable[..., None]) -> Path:
    """30 images in two class folders."""
    fill_folder(tmp_path / "images" / "cat", 20)
    fill_folder(tmp_path / "images" / "dog", 10, first_seed=50)
    return tmp_path / "images"


@pytest.mark.parametrize("second", ["test", "val"])
def test_parts_of_a_folder(tmp_path: Path, fill_folder: Callable[..., None], second: str) -> None:
    source, out = tmp_path / "images", tmp_path / "out"
    fill_folder(source / "train" / "b", 3)
    fill_folder(source / "train" / "a", 2, first_seed=10)
    fill_folder(source / "train" / "unlabelled", 2, first_seed=20)
    fill_folder(source / second / "b", 2, first_seed=30)
    created = create(source, out)
    assert {name: len(index.samples) for name, index in created.parts.items()} == {"train": 7, second: 2}
    train, other = by_source(out), by_source(out, second)
    assert {name for name, (_, _, about) in train.items() if "label" not in about} == {
        "train/unlabelled/0.png", "train/unlabelled/1.png",
    }  # fmt: skip
    assert {about["name"] for _, _, about in other.values()} == {"b"}
    assert train["train/b/0.png"][1] == (source / "train/b/0.png").read_bytes()
    assert len(members(*out.glob("*.tar"))) == 3 * 9 - 2  # keys are unique in the set
    create(source, tmp_path / "one", parts=(second,))
    assert {path.name for path in (tmp_path / "one").glob("*.tar")} == {f"{second}-000000.tar"}


def test_images_without_classes(tmp_path: Path, fill_folder: Callable[..., None]) -> None:
    fill_folder(tmp_path / "images", 3)
    created = create(tmp_path / "images", tmp_path / "out")
    assert created.parts["train"].samples.labels.tolist() == [-1] * 3
    assert {name.rpartition(".")[2] for name in members(tmp_path / "out" / "train-000000.tar")} == {
        "png",
        "json",
    }
    assert not (tmp_path / "out" / "classes.json").exists()


def test_a_table_of_images(tmp_path: Path, fill_folder: Callable[..., None]) -> None:
    fill_folder(tmp_path / "files", 4)
    rows = ["path,label,split", "files/0.png,1,train", "files/1.png,0,train", "files/2.png,,train"]
    (tmp_path / "table.csv").write_text("\n".join([*rows, "files/3.png,1,test"]))
    create(tmp_path / "table.csv", tmp_path / "out")
    train, test = by_source(tmp_path / "out"), by_source(tmp_path / "out", "test")
    assert {name: about.get("label") for name, (_, _, about) in train.items()} == {
        "files/0.png": 1, "files/1.png": 0, "files/2.png": None,
    }  # fmt: skip
    assert test["files/3.png"][1] == (tmp_path / "files" / "3.png").read_bytes()


@pytest.mark.parametrize("shape", [(5, 6, 7), (5, 6, 7, 3)])
def test_a_medmnist_archive(tmp_path: Path, shape: tuple[int, ...]) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    labels = np.array([[0], [1], [2], [1], [0]])
    arrays = {
        "train_images": images,
        "train_labels": labels,
        "test_images": images[::-1],
        "test_labels": labels,
    }
    np.savez(tmp_path / "some.npz", **arrays)
    create(tmp_path / "some.npz", tmp_path / "out")
    for part, order in (("train", range(5)), ("test", range(4, -1, -1))):
        samples = by_source(tmp_path / "out", part)
        for row, source in enumerate(order):
            suffix, content, about = samples[f"{part}/{row:06d}"]
            assert suffix == "png" and about["label"] == labels[row, 0]
            assert np.array_equal(pixels(content), images[source])
    images[3] += 1
    np.savez(tmp_path / "some.npz", **arrays)
    assert "another list of images" in refused(tmp_path / "some.npz", tmp_path / "out")


def test_torchvision_with_two_parts_by_a_flag(tmp_path: Path) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (6, 28, 28), dtype=np.uint8)
    for prefix, rows in (("train", slice(0, 4)), ("t10k", slice(4, 6))):
        count = len(images[rows])
        header = struct.pack(">iiii", 2051, count, 28, 28)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + images[rows].tobytes())
        labels = struct.pack(">ii", 2049, count) + bytes(range(count))
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(labels)
    create("torchvision:MNIST", tmp_path / "out", root=tmp_path)
    train, test = by_source(tmp_path / "out"), by_source(tmp_path / "out", "test")
    assert (len(train), len(test)) == (4, 2)
    suffix, content, about = train["train/000003"]
    assert suffix == "png" and np.array_equal(pixels(content), images[3])
    assert (about["label"], about["name"]) == (3, "3 - three")
    assert np.array_equal(pixels(test["test/000001"][1]), images[5])


def test_torchvision_with_two_parts_by_name(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    files = {}
    for part, count in (("train", 3), ("val", 2)):
        folder = tmp_path / "imagenette2" / part / "n01440764"
        folder.mkdir(parents=True)
        for number in range(count):
            files[part, number] = encode(len(files), format="JPEG")
            (folder / f"{number}.JPEG").write_bytes(files[part, number])
    create("torchvision:Imagenette", tmp_path / "out", root=tmp_path)
    train, test = by_source(tmp_path / "out"), by_source(tmp_path / "out", "test")
    # Files are copied, although torchvision would decode them.
    assert [train[f"train/{n:06d}"][:2] for n in range(3)] == [("jpg", files["train", n]) for n in range(3)]
    assert [test[f"test/{n:06d}"][:2] for n in range(2)] == [("jpg", files["val", n]) for n in range(2)]
    assert train["train/000000"][2]["name"] == "tench, Tinca tinca"


@pytest.mark.parametrize(
    "name, message",
    [
        ("Nothing", r"torchvision:Nothing: torchvision\.datasets has no 'Nothing'"),
        ("CIFAR10", r"torchvision:CIFAR10: cannot be opened \(Dataset not found.*\); correct --root, or add"),
        ("EMNIST", r"torchvision:EMNIST: has no part for training \(Unknown value 'train'"),
    ],
)
def test_torchvision_data_sets_that_cannot_be_had(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_inputs(f"torchvision:{name}", tmp_path)
    with pytest.raises(UserError, match=message if name == "Nothing" else "--root: give the folder of"):
        open_inputs(f"torchvision:{name}")


@pytest.mark.parametrize(
    "name, message",
    [
        ("nothing", "{path}: not there; expected an image folder, a .csv or .npz file, or torchvision:NAME"),
        ("file.txt", "{path}: neither a folder nor a file ending in .csv, .tsv, .npz"),
        ("empty", "no images in {path}; expected files ending in "),
        ("half", "{path}: has a folder 'val' but no 'train'; add or rename it"),
    ],
)
def test_sources_that_are_none(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file.txt").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "half" / "val").mkdir(parents=True)
    path = tmp_path / name
    assert refused(path, tmp_path / "out").startswith(message.format(path=path))
    assert not (tmp_path / "out").exists()


def test_options_that_do_not_suit_the_source(tmp_path: Path, classes: Path) -> None:
    message = refused(classes, tmp_path / "out", parts=("train", "val"))
    assert message == f"--parts: {classes} has no part 'val', only train"
    with pytest.raises(UserError, match=r"--root and --download are for torchvision:NAME; leave them out"):
        open_inputs(str(classes), root=tmp_path)
