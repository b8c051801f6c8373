from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlomae.data.dataset import Dataset, TensorSource
from mlomae.data.faults import BadSample
from mlomae.data.folder import FilesSource
from mlomae.data.sources import open_dataset
from mlomae.data.splits import Splits, make_splits, verify_disjoint
from mlomae.errors import UserError
from mlomae.sections import DataConfig


def dataset_of(keys: list[str], own_test: bool = False, labels: Tensor | None = None) -> Dataset:
    source = TensorSource(keys, torch.zeros(len(keys), 1, 1, 1, dtype=torch.uint8), labels)
    return Dataset(source, None, (0.5,), (0.5,), open_test=(lambda: source) if own_test else None)


def members(keys: list[str], data: DataConfig, own_test: bool = False) -> dict[str, set[str]]:
    splits = make_splits(dataset_of(keys, own_test), data)
    parts = {"train": splits.train, "heldout": splits.heldout, "test": splits.test}
    return {name: {keys[i] for i in part.tolist()} for name, part in parts.items() if part is not None}


KEYS = [f"image/{number}" for number in range(4000)]


def test_sets_are_disjoint_complete_and_of_the_right_size() -> None:
    parts = members(KEYS, DataConfig(heldout_fraction=0.25, test_fraction=0.2))
    assert set.union(*parts.values()) == set(KEYS)
    assert sum(map(len, parts.values())) == len(KEYS)
    assert len(parts["test"]) == pytest.approx(0.2 * 4000, rel=0.1)
    assert len(parts["heldout"]) == pytest.approx(0.25 * 0.8 * 4000, rel=0.1)


def test_a_data_set_with_a_test_part_is_split_in_two() -> None:
    parts = members(KEYS, DataConfig(heldout_fraction=0.25), own_test=True)
    assert set(parts) == {"train", "heldout"}
    assert parts["train"] | parts["heldout"] == set(KEYS)
    assert len(parts["heldout"]) == pytest.approx(1000, rel=0.1)


def test_membership_survives_new_samples_and_another_order() -> None:
    before = members(KEYS[:2000], DataConfig())
    after = members(KEYS[::-1], DataConfig())
    for name, keys in before.items():
        assert after[name] & set(KEYS[:2000]) == keys


def test_a_larger_fraction_only_adds() -> None:
    small, large = (members(KEYS, DataConfig(heldout_fraction=f))["heldout"] for f in (0.1, 0.3))
    assert small < large


def test_the_seed_changes_the_split() -> None:
    first, second = (members(KEYS, DataConfig(split_seed=seed)) for seed in (0, 1))
    for name in first:
        share = len(first[name] & second[name]) / len(first[name])
        assert share == pytest.approx(len(second[name]) / len(KEYS), abs=0.05)  # as if drawn independently


@pytest.mark.parametrize(
    "fractions, message",
    [
        ({"test_fraction": 1e-9}, r"data\.test_fraction: 1e-09 leaves no test image of 10; raise it"),
        (
            {"heldout_fraction": 1e-9},
            r"data\.heldout_fraction: 1e-09 leaves no held-out image of 10; raise it",
        ),
        (
            {"heldout_fraction": 1 - 1e-9},
            r"data\.heldout_fraction: 0\.9+ leaves no training image of 10; lower it",
        ),
    ],
)
def test_an_empty_set_names_the_fraction(fractions: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_splits(dataset_of(KEYS[:10]), DataConfig(**{"test_fraction": 0.3, **fractions}))


@pytest.mark.parametrize("own_test", [False, True])
def test_samples_without_a_label_only_train(own_test: bool) -> None:
    labels = torch.arange(4000) % 5 - 1  # each fifth has none
    data = DataConfig(heldout_fraction=0.25, test_fraction=0.2)
    splits = make_splits(dataset_of(KEYS, own_test, labels), data)
    whole = make_splits(dataset_of(KEYS, own_test, labels.clamp(min=0)), data)
    assert torch.equal(whole.labelled, whole.train)
    assert (labels[splits.train] == -1).sum() == 800
    assert torch.equal(splits.labelled, splits.train[labels[splits.train] >= 0])
    # Labelled samples are where they would be if all others had labels too.
    for name in ("labelled", "heldout") if own_test else ("labelled", "heldout", "test"):
        part = getattr(whole, name)
        assert torch.equal(getattr(splits, name), part[labels[part] >= 0])
        assert len(getattr(splits, name)) > 400
    assert own_test == (splits.test is None)


def test_without_labels_all_samples_are_drawn_from_and_none_is_labelled() -> None:
    splits = make_splits(dataset_of(KEYS), DataConfig())
    alike = make_splits(dataset_of(KEYS, labels=torch.zeros(4000, dtype=torch.int64)), DataConfig())
    assert len(splits.labelled) == 0 and splits.labelled.dtype == torch.int64
    assert torch.equal(splits.train, alike.train) and torch.equal(splits.heldout, alike.heldout)


@pytest.mark.parametrize(
    "labelled, fractions, message",
    [
        (
            range(6),
            {"heldout_fraction": 1e-9},
            r"data\.heldout_fraction: 1e-09 leaves no held-out image of 6 labelled ones \(of 4000\); "
            "raise it or label more images",
        ),
        (
            range(6),
            {"heldout_fraction": 1 - 1e-9},
            r"data\.heldout_fraction: 0\.9+ leaves no training image of 6 labelled ones \(of 4000\); lower",
        ),
        ([7], {}, r"leaves no (test|held-out|training) image of 1 labelled ones \(of 4000\); .* label more"),
        ([], {}, r"data\.test_fraction: 0\.2 leaves no test image of 0 labelled ones"),
    ],
)
def test_too_few_labels_name_what_to_change(labelled: Any, fractions: dict[str, float], message: str) -> None:
    labels = torch.full((4000,), -1)
    labels[list(labelled)] = 0
    with pytest.raises(UserError, match=message):
        make_splits(dataset_of(KEYS, labels=labels), DataConfig(**{"test_fraction": 0.2, **fractions}))


def test_a_key_in_two_sets_is_refused() -> None:
    train = torch.tensor([0, 1])
    splits = Splits(train, train[:1], torch.tensor([2]), torch.tensor([3]))
    verify_disjoint(splits, ["a", "b", "c", "d"])
    for keys, pair in (
        (["a", "b", "a", "d"], "train and the held-out"),
        (["a", "b", "c", "c"], "held-out and the test"),
    ):
        with pytest.raises(UserError, match=f"is in the {pair} set; keys must be unique"):
            verify_disjoint(splits, keys)


@pytest.fixture
def folder(tmp_path: Path, fill_folder: Callable[..., None]) -> Path:
    fill_folder(tmp_path / "train" / "a", 40)
    fill_folder(tmp_path / "test" / "a", 5, first_seed=100)
    return tmp_path


def link(original: Path, copy: Path) -> None:
    copy.symlink_to(original)


@pytest.mark.parametrize("duplicate, name", [(link, "new.png"), (os.link, "new.png"), (shutil.copy, "0.png")])
def test_a_test_image_that_is_a_training_image_is_refused(folder: Path, duplicate: Any, name: str) -> None:
    data = DataConfig(dataset="folder", path=folder)
    make_splits(open_dataset(data, 3), data)
    (folder / "test" / "a" / name).unlink(missing_ok=True)
    duplicate(folder / "train" / "a" / "0.png", folder / "test" / "a" / name)
    message = (
        rf"data\.path: test file .*test/a/{name} is the training file .*train/a/0\.png; keep the parts apart"
    )
    with pytest.raises(UserError, match=message):
        make_splits(open_dataset(data, 3), data)


def test_files_that_differ_late_are_apart(folder: Path) -> None:
    """As scans of one size with a black border, whose first mebibyte is the same."""
    for part, last in (("train", b"a"), ("test", b"b")):
        (folder / part / "a" / "scan.bmp").write_bytes(bytes(2**20) + last)
    data = DataConfig(dataset="folder", path=folder)
    make_splits(open_dataset(data, 3), data)


def test_a_name_that_no_file_can_have_is_a_bad_sample(folder: Path) -> None:
    source = FilesSource(folder, ["x" * 300 + ".png"], None)
    with pytest.raises(BadSample, match="cannot be read"):
        source.content(0)


def test_a_linked_test_folder_is_refused(folder: Path) -> None:
    shutil.rmtree(folder / "test")
    (folder / "test").symlink_to(folder / "train")
    data = DataConfig(dataset="folder", path=folder)
    with pytest.raises(UserError, match=r"test file .* is the training file"):
        make_splits(open_dataset(data, 3), data)


def test_a_dangling_link_is_met_when_it_is_read(folder: Path) -> None:
    for part in ("train", "test"):
        (folder / part / "a" / "gone.png").symlink_to(folder / "nowhere.png")
    data = DataConfig(dataset="folder", path=folder)
    dataset = open_dataset(data, 3)
    make_splits(dataset, data)
    assert dataset.open_test is not None
    for source in (dataset.train, dataset.open_test()):
        with pytest.raises(BadSample, match=r"cannot be read \(No such file or directory\)"):
            source.content(list(source.keys).index("a/gone.png"))


def test_a_link_to_itself_is_named(folder: Path) -> None:
    (folder / "test" / "a" / "loop.png").symlink_to(folder / "test" / "a" / "loop.png")
    data = DataConfig(dataset="folder", path=folder)
    with pytest.raises(UserError, match=r"data\.path: .*loop\.png cannot be read"):
        make_splits(open_dataset(data, 3), data)


@pytest.mark.parametrize("duplicate", [link, os.link, shutil.copy])
def test_a_test_shard_that_is_a_training_shard_is_refused(
    tmp_path: Path, fill_shard: Callable[..., None], duplicate: Any
) -> None:
    for number in range(2):
        fill_shard(tmp_path / f"train-{number}.tar", 20, first_seed=20 * number)
    fill_shard(tmp_path / "test-0.tar", 20, first_seed=100)  # of the same size
    data = DataConfig(dataset="shards", path=tmp_path)
    make_splits(open_dataset(data, 3), data)
    duplicate(tmp_path / "train-1.tar", tmp_path / "test-1.tar")
    with pytest.raises(
        UserError, match=r"data\.path: test file .*test-1\.tar is the training file .*train-1\.tar"
    ):
        make_splits(open_dataset(data, 3), data)
