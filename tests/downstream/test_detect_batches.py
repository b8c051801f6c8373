"""Batches of images with boxes: boxes stay on what they name, and batch n is a function of n."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mlomae.data.batches import Order, iterate
from mlomae.data.boxes import BoxesConfig, open_boxes
from mlomae.downstream.box_batches import BoxBatch, ScoredBoxes, TrainingBoxes
from mlomae.downstream.box_transforms import BoxAugmentConfig, augment, fit
from mlomae.errors import UserError
from tests.data.made_boxes import make_boxes

PLAIN = BoxAugmentConfig(flip=0, scale=(1, 1))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_boxes(tmp_path_factory.mktemp("boxes") / "set", {"train": 11, "test": 5})


def training(root: Path, rank: int = 0, ranks: int = 1, frame: tuple[int, int] = (64, 64)) -> TrainingBoxes:
    local = 4 // ranks
    order = Order((0, "x", "order"), 5, batch=4, local=local, first_row=rank * local)
    source, _ = open_boxes(BoxesConfig(path=str(root)))
    return TrainingBoxes(source, frame, 3, BoxAugmentConfig(scale=(0.5, 1.5), colour=0.3), order)


def picture() -> tuple[Tensor, Tensor, Tensor]:
    """Black, [3, 40, 60], with a white rectangle; its box and one in a corner."""
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[:, 10:20, 5:25] = 255
    return image, torch.tensor([[5.0, 10, 25, 20], [50, 30, 60, 40]]), torch.tensor([1, 2])


def bright(image: Tensor) -> list[float]:
    """The box around what is brighter than grey."""
    rows, columns = (image[0] > 127).nonzero(as_tuple=True)
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


def test_a_flip_moves_boxes() -> None:
    image, boxes, labels = picture()
    config = replace_config(flip=1.0)
    flipped, moved, kept = augment(image, boxes, labels, (40, 60), config, seed=0)

    assert torch.equal(flipped, image.flip(2))
    assert moved.tolist() == [[35, 10, 55, 20], [0, 30, 10, 40]]
    assert kept.tolist() == [1, 2]
    assert type(moved) is type(flipped) is Tensor


def replace_config(**fields: object) -> BoxAugmentConfig:
    return BoxAugmentConfig.model_validate({**PLAIN.model_dump(), **fields})


@pytest.mark.parametrize("seed", range(6))
def test_boxes_follow_a_zoom_and_a_crop(seed: int) -> None:
    image, boxes, labels = picture()
    view, moved, kept = augment(image, boxes, labels, (80, 80), replace_config(scale=(1.5, 2.5)), seed)

    assert view.shape[1] <= 80 and view.shape[2] <= 80
    assert (
        (moved >= 0).all() and (moved[:, 2] <= view.shape[2]).all() and (moved[:, 3] <= view.shape[1]).all()
    )
    if 1 in kept:
        box = moved[kept == 1][0].tolist()
        assert bright(view) == pytest.approx(box, abs=1.0)
    else:
        assert view.max() < 127


def test_what_lies_outside_of_the_view_is_left_out() -> None:
    image, boxes, labels = picture()
    kept = [
        augment(image, boxes, labels, (40, 40), replace_config(scale=(4, 4)), seed)[2].tolist()
        for seed in range(8)
    ]
    # A fourth of the image's width and less of its height are in view: never both boxes.
    assert all(len(labels) < 2 for labels in kept) and len({tuple(labels) for labels in kept}) > 1


def test_fitting_keeps_the_shape() -> None:
    image = picture()[0]
    assert fit(image, (64, 64)).shape == (3, 43, 64)
    assert fit(image, (20, 64)).shape == (3, 20, 30)
    assert bright(fit(image, (80, 120))) == [10, 20, 50, 40]


def test_images_and_targets_of_a_batch(root: Path) -> None:
    order = replace(training(root).order, batch=11, local=11)
    batch = replace(training(root), config=PLAIN, order=order).read(0)
    source = training(root).source

    assert sorted(batch.indices.tolist()) == list(range(11))
    for index, image, target in zip(batch.indices.tolist(), batch.images(), batch.targets(), strict=True):
        # Images of up to 64 pixels per side are enlarged by no more than the frame allows.
        scale = min(64 / side for side in source.sizes[index])
        assert image.shape[1:] == tuple(round(side * scale) for side in source.sizes[index])
        torch.testing.assert_close(target["boxes"], source.objects(index).boxes * scale)
        assert torch.equal(target["labels"], source.objects(index).labels)
        torch.testing.assert_close(image, source.image(index, 3) / 255)


def same(one: BoxBatch, other: BoxBatch) -> bool:
    tensors = all(
        torch.equal(getattr(one, name), getattr(other, name))
        for name in ("pixels", "indices", "boxes", "classes")
    )
    return tensors and (one.sizes, one.counts, one.number) == (other.sizes, other.counts, other.number)


def test_batch_n_depends_on_n_only(root: Path) -> None:
    numbers = [3, 0, 7]
    alone = {number: training(root).read(number) for number in numbers}
    # Drawing elsewhere changes nothing, nor does it matter who reads.
    torch.rand(3)
    before = torch.get_rng_state()
    for workers in (0, 2):
        for number, batch in zip(numbers, iterate(training(root), numbers, workers), strict=True):
            assert isinstance(batch, BoxBatch) and same(batch, alone[number])
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(alone[3].pixels, alone[0].pixels)


def test_ranks_share_a_batch(root: Path) -> None:
    whole = training(root).read(4)
    parts = [training(root, rank, 2).read(4) for rank in (0, 1)]

    assert torch.equal(torch.cat([part.pixels for part in parts]), whole.pixels)
    assert torch.equal(torch.cat([part.boxes for part in parts]), whole.boxes)


def test_bad_images_are_replaced_in_training_and_left_out_in_scoring(root: Path, tmp_path: Path) -> None:
    broken = make_boxes(tmp_path / "set", {"train": 11, "test": 5})
    for path in (broken / "train" / "003.png", broken / "test" / "001.png"):
        path.write_bytes(path.read_bytes()[:60])
    batches = [training(broken).read(number) for number in range(6)]  # three epochs

    faults = {fault.key: fault.kind for batch in batches for fault in batch.faults}
    assert faults == {"003.png": "damaged"}
    assert all(len(batch.indices) == 4 and 3 not in batch.indices for batch in batches)

    _, test = open_boxes(BoxesConfig(path=str(broken)))
    scored = ScoredBoxes(test, (64, 64), 3, range(5), 2)
    read = [scored.read(number) for number in range(len(scored))]
    assert [index for batch in read for index in batch.indices.tolist()] == [0, 2, 3, 4]
    assert [fault.key for batch in read for fault in batch.faults] == ["001.png"]

    for path in (broken / "train").iterdir():
        path.write_bytes(b"poison")
    with pytest.raises(UserError, match="those tried before it are bad too"):
        training(broken).read(0)
