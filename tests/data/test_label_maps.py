"""Label maps follow their images through every augmentation, wherever they are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mlomae.config import Config, load_config
from mlomae.data.batches import Batch
from mlomae.data.loader import LevelLoaders
from mlomae.data.scenes import VOID
from mlomae.data.transforms import NUM_UNIFORMS, Augment, augment, augment_maps, fit, load, load_map
from mlomae.errors import UserError
from mlomae.random import counter_uniform
from tests.data.made_scenes import NUM_CLASSES, UNLABELLED, read_off, write_scenes

KINDS = get_args(Augment)
SIZE = (16, 24)
MakeConfig = Callable[..., Config]


@pytest.fixture
def scenes(tmp_path: Path) -> Path:
    write_scenes(tmp_path, "training", 60, SIZE)
    write_scenes(tmp_path, "validation", 10, SIZE, first=100)
    return tmp_path


@pytest.fixture
def config_of(make_config: MakeConfig, scenes: Path) -> MakeConfig:
    def make(**data: Any) -> Config:
        model = {"img_size": data.pop("img_size", SIZE), "patch_size": 4, "in_chans": 3}
        fields = {"dataset": "scenes", "path": scenes, "num_classes": NUM_CLASSES, "void": [UNLABELLED]}
        return make_config(model=model, data={**fields, **data})

    return make


def blocks(seed: int, height: int, width: int) -> Tensor:
    """uint8 [H, W]: labels in squares of 12 pixels."""
    drawn = torch.randint(0, 4, (height // 12 + 1, width // 12 + 1), generator=torch.manual_seed(seed))
    return drawn.repeat_interleave(12, 0).repeat_interleave(12, 1)[:height, :width].to(torch.uint8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("full, size", [((48, 64), (48, 64)), ((96, 60), (48, 64)), ((60, 120), (24, 36))])
def test_labels_stay_with_their_pixels(kind: Augment, full: tuple[int, int], size: tuple[int, int]) -> None:
    u = counter_uniform(3, 1, 0, (16, NUM_UNIFORMS))
    maps = [blocks(seed, *full) for seed in range(16)]
    images = [(60 * labels[None]).to(torch.uint8) for labels in maps]
    rows = u.tolist()
    pixels = augment(
        kind, torch.stack([load(i, kind, row, size, 1) for i, row in zip(images, rows, strict=True)]), u
    )
    labels = augment_maps(
        kind, torch.stack([load_map(m, kind, row, size) for m, row in zip(maps, rows, strict=True)]), u
    )

    assert labels.shape == (16, *size) and labels.dtype == torch.uint8
    if full == size and kind != "resized-crop":
        assert torch.equal(pixels[:, 0], 60 * labels)
    # Bicubic resizing blurs: two pixels beside every edge are left out, and at the borders, behind which an
    # edge may have been cut off.
    padded = torch.nn.functional.pad(labels.float()[:, None], (2, 2, 2, 2), value=-1.0)
    highest, lowest = (s * torch.nn.functional.max_pool2d(s * padded, 5, 1) for s in (1, -1))
    inside = (highest == lowest)[:, 0]
    assert inside.float().mean() > 0.03
    difference = (pixels[:, 0].float() - 60 * labels.float()).abs()
    assert difference[inside].max() <= 12  # a fifth of the step from one label to the next


def test_a_map_takes_the_nearest_label(scenes: Path) -> None:
    labels = torch.randint(0, 255, (10, 21), dtype=torch.uint8)
    rows = ((torch.arange(5) + 0.5) * 10 / 5).long()
    columns = ((torch.arange(10) + 0.5) * 21 / 10).long()  # 10.5 columns wanted, rounded to 10
    assert torch.equal(fit(labels[None], (5, 10), nearest=True)[0], labels[rows][:, columns])


@pytest.mark.parametrize("kind", ["none", "shift", "crop-flip"])
def test_batches_carry_the_maps_of_their_images(config_of: MakeConfig, kind: str) -> None:
    loaders = LevelLoaders(config_of(augment=kind))
    assert (loaders.num_classes, loaders.has_label_maps) == (NUM_CLASSES, True)
    for stream in (loaders.pretrain, loaders.head, loaders.mask):
        assert stream is not None
        batch = stream.next()
        assert batch.labels is not None and batch.labels.dtype == torch.uint8
        assert batch.labels.shape == (8, *SIZE)
        assert torch.equal(batch.labels, truth(batch, loaders))
    assert {*range(NUM_CLASSES), VOID} == set(batch.labels.unique().tolist())


def truth(batch: Batch, loaders: LevelLoaders) -> Tensor:
    return read_off(batch.images[:, 0] * loaders.std[0] + loaders.mean[0])


@pytest.mark.parametrize("kind", KINDS)
def test_no_way_of_reading_changes_a_batch(config_of: MakeConfig, kind: str) -> None:
    ways: list[dict[str, Any]] = [{"resident": "never"}, {"resident": "never", "workers": 2}]
    if kind != "resized-crop":
        ways.append({"resident": "always"})
    streams = [LevelLoaders(config_of(augment=kind, img_size=(12, 16), **way)).head for way in ways]
    for _ in range(3):
        first, *others = [stream.next() for stream in streams if stream is not None]
        assert first.labels is not None
        for other in others:
            assert other.labels is not None
            assert torch.equal(first.images, other.images) and torch.equal(first.labels, other.labels)
    for stream in streams:
        assert stream is not None
        stream.close()


def test_ranks_share_the_maps_of_a_batch(config_of: MakeConfig) -> None:
    config = config_of(augment="crop-flip")
    whole = LevelLoaders(config).pretrain.next()
    shares = [LevelLoaders(config, rank, 2).pretrain.next() for rank in (0, 1)]
    assert whole.labels is not None
    assert torch.equal(
        torch.cat([share.labels for share in shares if share.labels is not None]), whole.labels
    )


def test_the_test_part_is_its_own_folder(config_of: MakeConfig, scenes: Path) -> None:
    for path in (scenes / "annotations" / "validation").iterdir():
        path.write_bytes(b"poison")
    loaders = LevelLoaders(config_of())  # its maps are not looked at before the evaluation
    sizes = loaders.sizes
    assert (sizes["train"] + sizes["heldout"], sizes["test"]) == (60, 10)
    with pytest.raises(UserError):
        list(loaders.evaluation("test"))

    write_scenes(scenes, "validation", 10, SIZE, first=100)
    loaders = LevelLoaders(config_of())
    batches = list(loaders.evaluation("test"))
    assert sum(len(batch.images) for batch in batches) == 10
    for batch in batches:
        assert batch.labels is not None and torch.equal(batch.labels, truth(batch, loaders))


@pytest.mark.parametrize("damage", ["cut", "gone", "other size"])
def test_an_image_whose_map_is_bad_is_passed_over(config_of: MakeConfig, scenes: Path, damage: str) -> None:
    victim = scenes / "annotations" / "training" / "005.png"
    config = config_of(max_bad_share=0.1, augment="crop-flip", resident="never")
    loaders = LevelLoaders(config)
    if damage == "cut":
        victim.write_bytes(victim.read_bytes()[:60])
    elif damage == "gone":
        victim.unlink()
    else:
        Image.fromarray(np.zeros((SIZE[0], SIZE[1] + 1), np.uint8)).save(victim)

    for _ in range(8):  # more than an epoch
        batch = loaders.pretrain.next()
        assert batch.labels is not None and torch.equal(batch.labels, truth(batch, loaders))
        assert len(batch.labels) == 8
    in_training = "training/005.png" in {
        f.key for f in loaders.ledger.take_new()
    }  # else it is a held-out image
    parts = {part: list(loaders.evaluation(part)) for part in ("train", "heldout")}
    (fault,) = loaders.ledger._known.values()
    assert (fault.key, fault.kind) == ("training/005.png", "label")
    assert "label map" in fault.reason
    assert sum(len(batch.images) for batches in parts.values() for batch in batches) == 59
    assert in_training


@pytest.mark.parametrize("workers", [0, 1])
def test_a_value_that_is_no_class_is_an_error(config_of: MakeConfig, scenes: Path, workers: int) -> None:
    stream = LevelLoaders(config_of(workers=workers, resident="never")).pretrain
    for path in (scenes / "annotations" / "training").iterdir():
        Image.fromarray(np.full(SIZE, 9, np.uint8)).save(path)
    with pytest.raises(UserError, match=r"has label 9, but classes are 0 to 2; add it to data\.void"):
        stream.next()


@pytest.mark.parametrize(
    "fields, problem",
    [
        ({"data.num_classes": "null"}, "data: num_classes is missing; how many classes"),
        ({"data.dataset": "folder"}, "data: num_classes 3 is for scenes; leave it out for 'folder'"),
        ({"data.access": "random"}, "data: access 'random' is for shards"),
    ],
)
def test_wrong_fields_are_refused(scenes: Path, fields: dict[str, str], problem: str) -> None:
    given = {"data.dataset": "scenes", "data.path": str(scenes), "data.num_classes": "3"}
    with pytest.raises(UserError) as caught:
        load_config(None, {**given, **fields})
    assert str(caught.value).startswith(problem)


@pytest.mark.parametrize(
    "fields, problem",
    [
        ({"void": [1]}, "data: void [1]: 1 is a class"),
        ({"test": "training"}, "data: train and test are the same folder"),
        ({"test": "testing"}, "data.test: "),
        ({"train": "other"}, "data.path: "),
        ({"num_classes": 256}, "data: num_classes 256 from first_label 0"),
    ],
)
def test_what_does_not_fit_the_scenes_is_refused(
    config_of: MakeConfig, fields: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UserError) as caught:
        LevelLoaders(config_of(**fields))
    assert str(caught.value).startswith(problem) and "\n" not in str(caught.value)


def test_sets_for_classifiers_refuse_label_maps() -> None:
    from pydantic import ValidationError

    from mlomae.sections import ImagesConfig

    with pytest.raises(ValidationError, match="has labels of pixels, but labels of images are needed"):
        ImagesConfig(dataset="scenes", path="x")
