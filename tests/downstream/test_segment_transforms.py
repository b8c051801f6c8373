"""Joint augmentation: image and map stay together, and a seed decides everything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from mlomae.data.batches import Order, iterate
from mlomae.data.scenes import VOID, ScenesConfig, open_scenes
from mlomae.downstream.joint_transforms import MAX_CLASS_SHARE, AugmentConfig, augment_scene, scaled
from mlomae.downstream.scene_batches import TestScenes, TrainScenes
from tests.data.made_squares import draw_squares, encode_png, write_squares

MEAN = (0.5, 0.4, 0.3)


def coded_scene() -> tuple[Tensor, Tensor]:
    """Six fields of 20 x 20 pixels; the red channel is 40 times the class."""
    rows, columns = torch.arange(40)[:, None] // 20, torch.arange(60)[None] // 20
    labels = (rows + 2 * columns).to(torch.uint8)
    return torch.stack([labels * 40, labels, labels]), labels


def augmented(seed: int, size: tuple[int, int] = (24, 32), **fields: Any) -> tuple[Tensor, Tensor]:
    config = AugmentConfig.model_validate({"colour": 0.0, **fields})
    return augment_scene(*coded_scene(), size, MEAN, config, seed)


@pytest.mark.parametrize("scale", [(0.6, 0.6), (1.0, 1.0), (0.6, 2.0)])
def test_image_and_map_stay_aligned(scale: tuple[float, float]) -> None:
    for seed in range(10):
        image, labels = augmented(seed, scale=scale)
        assert image.shape == (3, 24, 32) and labels.shape == (24, 32)
        assert image.dtype == labels.dtype == torch.uint8
        # Where fields meet, resizing mixes their colours; inside of them the colour is that of the class.
        inner = _inner(labels) & (labels != VOID)
        assert inner.sum() > 20
        assert torch.equal(image[0][inner], 40 * labels[inner])
        void = labels == VOID
        for channel, mean in zip(image, MEAN, strict=True):
            assert torch.equal(channel[void], torch.full_like(channel[void], round(255 * mean)))


def _inner(labels: Tensor) -> Tensor:
    """bool [H, W]: pixels that have the same label as all within two pixels."""
    padded = torch.nn.functional.pad(labels.float(), (2, 2, 2, 2), value=-1)
    windows = padded.unfold(0, 5, 1).unfold(1, 5, 1).flatten(2)
    return windows.amax(-1) == windows.amin(-1)


def test_a_small_scale_fills_up_with_void_and_a_large_one_does_not() -> None:
    assert (augmented(0, scale=(0.5, 0.5))[1] == VOID).float().mean() > 0.5
    assert (augmented(0, scale=(1.0, 2.0))[1] != VOID).all()


def test_at_scale_one_an_image_of_the_right_shape_is_only_resized() -> None:
    image, labels = coded_scene()
    same_image, same_labels = augment_scene(
        image, labels, (40, 60), MEAN, AugmentConfig(scale=(1.0, 1.0), flip=False, colour=0.0), 0
    )
    assert torch.equal(same_image, image) and torch.equal(same_labels, labels)


def test_mirroring_is_drawn_and_can_be_switched_off() -> None:
    image, labels = coded_scene()

    def outcomes(flip: bool) -> set[str]:
        config = AugmentConfig(scale=(1.0, 1.0), flip=flip, colour=0.0)
        found = set()
        for seed in range(12):
            turned = augment_scene(image, labels, (40, 60), MEAN, config, seed)
            for name, dims in (("same", ()), ("mirrored", (-1,))):
                if all(torch.equal(a.flip(dims), b) for a, b in zip((image, labels), turned, strict=True)):
                    found.add(name)
        return found

    assert outcomes(True) == {"same", "mirrored"}
    assert outcomes(False) == {"same"}


def test_colours_change_the_image_and_not_the_map() -> None:
    plain, labels = augmented(3)
    varied, same = augmented(3, colour=0.5)
    assert torch.equal(labels, same)
    assert not torch.equal(plain, varied)


def test_a_seed_decides_and_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    first = augmented(5, colour=0.5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again, other = augmented(5, colour=0.5), augmented(6, colour=0.5)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[1], other[1])


def test_crops_of_nearly_one_class_are_drawn_again() -> None:
    labels = torch.zeros(64, 64, dtype=torch.uint8)
    labels[:, 48:] = 1
    image = labels.expand(3, -1, -1).contiguous()
    config = AugmentConfig(scale=(4.0, 4.0), colour=0.0)
    shares = []
    for seed in range(30):
        _, crop = augment_scene(image, labels, (16, 16), MEAN, config, seed)
        shares.append(max(float((crop == number).float().mean()) for number in (0, 1)))
    # A single draw has both classes in enough number one time in six.
    assert np.mean(np.array(shares) <= MAX_CLASS_SHARE) > 0.5


def test_a_grey_image_is_augmented_too() -> None:
    image, labels = coded_scene()
    varied, _ = augment_scene(image[:1], labels, (24, 32), (0.5,), AugmentConfig(), 0)
    assert varied.shape == (1, 24, 32)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (7, 300), (24, 32)])
def test_the_size_covers_the_crop_and_keeps_the_shape(shape: tuple[int, int]) -> None:
    height, width = scaled(shape, (24, 32), 1.0)
    assert height >= 24 and width >= 32 and (height == 24 or width == 32)
    assert height / width == pytest.approx(shape[0] / shape[1], rel=0.05)


def test_a_range_that_is_none_is_refused() -> None:
    for scale in ((0.0, 1.0), (2.0, 1.0)):
        with pytest.raises(ValidationError, match="scale"):
            AugmentConfig(scale=scale)


@pytest.fixture
def scenes(tmp_path: Path) -> TrainScenes:
    """Ten scenes in batches of four."""
    write_squares(tmp_path, "training", 10)
    source = open_scenes(ScenesConfig(path=str(tmp_path), num_classes=3), "training")
    return TrainScenes(source, (16, 24), MEAN, AugmentConfig(), Order((0, "t", "order"), 7, 4, 4, 0))


def test_batches_are_the_same_from_loader_processes_and_from_any_start(scenes: TrainScenes) -> None:
    here = list(iterate(scenes, range(3), workers=0))
    there = list(iterate(scenes, range(3), workers=2))
    later = list(iterate(scenes, range(2, 3), workers=0))
    for one, other in [*zip(here, there, strict=True), (here[2], later[0])]:
        assert one.labels is not None and other.labels is not None
        assert torch.equal(one.pixels, other.pixels) and torch.equal(one.labels, other.labels)
    assert not torch.equal(here[0].pixels, here[1].pixels)


def test_an_epoch_takes_each_scene_at_most_once_and_the_next_in_another_order(scenes: TrainScenes) -> None:
    first = torch.cat([scenes.read(number).indices for number in (0, 1)])
    second = torch.cat([scenes.read(number).indices for number in (2, 3)])
    assert len(first.unique()) == len(second.unique()) == 8
    assert not torch.equal(first, second)


def test_shares_of_two_ranks_are_the_batch_of_one(scenes: TrainScenes) -> None:
    whole = scenes.read(1)
    for rank in range(2):
        order = Order(scenes.order.seed, scenes.order.augment_seed, 4, 2, 2 * rank)
        share = TrainScenes(scenes.source, scenes.size, MEAN, scenes.augment, order).read(1)
        assert torch.equal(share.pixels, whole.pixels[2 * rank : 2 * rank + 2])


def test_a_good_sample_stands_in_for_a_bad_one(scenes: TrainScenes, tmp_path: Path) -> None:
    (tmp_path / "images" / "training" / "s3.png").write_bytes(b"")
    batches = [scenes.read(number) for number in range(4)]
    assert all(len(batch.pixels) == 4 for batch in batches)
    assert {fault.key for batch in batches for fault in batch.faults} == {"training/s3.png"}


def test_a_test_image_has_the_size_of_the_network_and_its_map_its_own(tmp_path: Path) -> None:
    write_squares(tmp_path, "validation", 2, size=(30, 50))
    (tmp_path / "images" / "validation" / "s1.png").write_bytes(encode_png(draw_squares(1, 30, 50)[0])[:100])
    source = open_scenes(ScenesConfig(path=str(tmp_path), num_classes=3), "validation")
    scenes = TestScenes(source, (16, 24), 3)

    good, bad = scenes.read(0), scenes.read(1)

    assert good.labels is not None
    assert good.pixels.shape == (1, 3, 16, 27) and good.labels.shape == (1, 30, 50)
    assert len(bad.pixels) == 0 and bad.labels is None
    assert [fault.key for fault in bad.faults] == ["validation/s1.png"]
