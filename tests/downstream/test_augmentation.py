"""Augmentation is a function of image and seed; batches are one of their number."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from torch import Tensor

from mlomae.data.batches import Order, PixelBatch, iterate
from mlomae.data.folder import FilesSource, class_labels, find_classes, list_images
from mlomae.data.subset import Subset
from mlomae.data.transforms import fit
from mlomae.downstream.augmentation import Augmentation, AugmentConfig, AugmentedBatches

MEAN = (0.4, 0.5, 0.6)
PLAIN = AugmentConfig(crop="none", flip=False, rand_augment="none", erasing=0, mixup=0, cutmix=0)


def picture(height: int = 20, width: int = 16, channels: int = 3) -> Tensor:
    return torch.randint(0, 256, (channels, height, width), dtype=torch.uint8)


def changed(**fields: object) -> AugmentConfig:
    return AugmentConfig.model_validate({**PLAIN.model_dump(), **fields})


def test_without_augmentation_an_image_is_fitted() -> None:
    image = picture(30, 16)

    assert torch.equal(Augmentation(PLAIN, (8, 8), MEAN)(image, 0), fit(image, (8, 8)))


def test_a_padded_crop_is_a_window_of_the_reflected_image() -> None:
    image = picture(16, 16)
    augment = Augmentation(changed(crop="padded", flip=True), (16, 16), MEAN)
    reflected = np.pad(image.numpy(), ((0, 0), (2, 2), (2, 2)), mode="reflect")
    windows = {
        np.ascontiguousarray(window[:, :, ::step]).tobytes(): (top, left, step)
        for top, left in itertools.product(range(5), repeat=2)
        for step in (1, -1)
        for window in [reflected[:, top : top + 16, left : left + 16]]
    }

    found = {windows[augment(image, seed).contiguous().numpy().tobytes()] for seed in range(200)}

    assert len(found) > 45  # of 50


def test_the_largest_box_is_the_whole_image() -> None:
    image = picture(20, 20)
    expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((8, 8), Image.Resampling.BICUBIC)

    found = Augmentation(changed(crop="resized", min_area=1.0), (8, 8), MEAN)(image, 3)

    np.testing.assert_array_equal(found.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_boxes_are_no_smaller_than_asked_for() -> None:
    """Of an image whose pixels tell their row: the rows that a box shows are at least so many."""
    image = torch.arange(200, dtype=torch.uint8).expand(1, 200, 200).mT.contiguous()
    augment = Augmentation(changed(crop="resized", min_area=0.5), (32, 32), MEAN[:1])

    spans = [int(crop.max()) - int(crop.min()) for crop in (augment(image, seed) for seed in range(100))]

    assert min(spans) > 200 * (0.5 * 3 / 4) ** 0.5 * 0.9  # flattest box; a resized edge loses some rows
    assert min(spans) < 150 < max(spans)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("crop", ["resized", "padded", "none"])
def test_everything_at_once_keeps_shape_and_depends_on_the_seed_only(channels: int, crop: str) -> None:
    fields = {"crop": crop, "flip": True, "color_jitter": 0.4, "rand_augment": "rand-m9-mstd0.5-inc1"}
    augment = Augmentation(changed(**fields), (16, 12), MEAN[:channels])
    image = picture(channels=channels)
    before = image.clone()

    first = [augment(image, seed) for seed in range(20)]
    again = [augment(image, seed) for seed in reversed(range(20))][::-1]

    assert {tuple(one.shape) for one in first} == {(channels, 16, 12)}
    assert {one.dtype for one in first} == {torch.uint8}
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert len({one.numpy().tobytes() for one in first}) > 15
    assert torch.equal(image, before)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_highest_magnitude_works(channels: int) -> None:
    """timm asks Pillow for 0 bits then, which it refuses."""
    augment = Augmentation(changed(rand_augment="rand-m10-n4-p1-inc1"), (8, 8), MEAN[:channels])
    image = picture(8, 8, channels)

    found = [augment(image, seed) for seed in range(60)]

    assert len({one.numpy().tobytes() for one in found}) > 30


@pytest.mark.parametrize("notation", ["autoaugment", "rand-m9-x3", "rand-mstd", "m9", "rand-n0"])
def test_a_wrong_notation_is_refused(notation: str) -> None:
    with pytest.raises(ValidationError, match=r"such as rand-m9-mstd0\.5-inc1"):
        AugmentConfig(rand_augment=notation)


@pytest.fixture
def batches(colour_folder: Path) -> AugmentedBatches:
    root = colour_folder / "train"
    names = list_images(root)
    source = FilesSource(root, names, class_labels(root, names, find_classes(root, names)))
    subset = Subset(source, torch.arange(len(names)), (16, 16), MEAN, MEAN)
    order = Order(seed=(3, "finetune", "order"), augment_seed=7, batch=8, local=8, first_row=0)
    return AugmentedBatches(subset, Augmentation(AugmentConfig(), (16, 16), MEAN), order)


def first_few(batches: AugmentedBatches, workers: int) -> list[PixelBatch]:
    reading: Iterator[PixelBatch] = iterate(batches, range(4), workers)
    return list(reading)


@pytest.mark.dist
def test_loader_processes_change_nothing(batches: AugmentedBatches) -> None:
    here, there = first_few(batches, 0), first_few(batches, 2)

    for one, other in zip(here, there, strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert one.labels is not None and other.labels is not None
        assert torch.equal(one.labels, other.labels)


def test_a_batch_is_a_function_of_its_number(batches: AugmentedBatches) -> None:
    several = first_few(batches, 0)

    assert torch.equal(batches.read(2).pixels, several[2].pixels)
    assert not torch.equal(several[2].pixels, several[3].pixels)


def test_reading_leaves_the_generators_alone(batches: AugmentedBatches) -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    batches.read(0)

    assert draw() == expected


def test_an_epoch_holds_every_image_at_most_once(batches: AugmentedBatches) -> None:
    epoch = [batches.read(number).indices for number in range(60 // 8)]
    indices = torch.cat(epoch)

    assert len(indices.unique()) == len(indices) == 56
    assert not torch.equal(batches.read(7).indices, epoch[0])  # another order in the next one


def test_ranks_share_a_batch(batches: AugmentedBatches) -> None:
    whole = batches.read(5)
    halves = [
        replace(batches, order=replace(batches.order, local=4, first_row=first)).read(5) for first in (0, 4)
    ]

    assert torch.equal(torch.cat([half.pixels for half in halves]), whole.pixels)
    assert torch.equal(torch.cat([half.indices for half in halves]), whole.indices)
