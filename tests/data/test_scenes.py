"""Images with label maps: what is read, what values mean, and what is refused."""

from __future__ import annotations

import io
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from mlomae.data.faults import BadSample
from mlomae.data.scenes import VOID, ScenesConfig, SceneSource, open_scenes
from mlomae.data.splits import verify_files
from mlomae.errors import UserError
from tests.data.made_squares import draw_squares, encode_png, write_squares
from tests.data.pictures import png


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three training and two validation scenes of 16 x 20 pixels."""
    write_squares(tmp_path, "training", 3, size=(16, 20))
    write_squares(tmp_path, "validation", 2, first_seed=50, size=(16, 20))
    return tmp_path


def config(root: Path, **fields: Any) -> ScenesConfig:
    return ScenesConfig.model_validate({"path": str(root), "num_classes": 3, **fields})


def open_training(root: Path, **fields: Any) -> SceneSource:
    return open_scenes(config(root, **fields), "training")


def put_map(root: Path, content: bytes, name: str = "s1.png") -> None:
    (root / "annotations" / "training" / name).write_bytes(content)


def refusal(root: Path, **fields: Any) -> str:
    """The one line with which the training part is refused, when it is opened or verified."""
    with pytest.raises(UserError) as caught:
        open_training(root, **fields).verify()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_images_and_maps_are_those_that_were_written(root: Path) -> None:
    source = open_training(root)

    assert list(source.keys) == ["training/s0.png", "training/s1.png", "training/s2.png"]
    for index in range(len(source)):
        pixels, values = draw_squares(index, 16, 20)
        image, labels = source.scene(index, 3)
        assert torch.equal(image, torch.from_numpy(pixels).permute(2, 0, 1))
        assert labels.dtype == torch.uint8
        assert torch.equal(labels, torch.from_numpy(values))
        assert torch.equal(source.label_map(index), labels)


def test_image_and_map_go_together_by_name_whatever_the_format(root: Path) -> None:
    content = io.BytesIO()
    Image.fromarray(draw_squares(1, 16, 20)[0]).save(content, "JPEG")
    (root / "images" / "training" / "s1.png").unlink()
    (root / "images" / "training" / "s1.jpg").write_bytes(content.getvalue())

    source = open_training(root)

    assert list(source.keys) == ["training/s0.png", "training/s1.jpg", "training/s2.png"]
    assert torch.equal(source.label_map(1), torch.from_numpy(draw_squares(1, 16, 20)[1]))


def test_values_are_counted_from_the_first_label_and_void_ones_are_marked(root: Path) -> None:
    values = np.array([[0, 1, 2], [3, 9, 255]], np.uint8)
    put_map(root, encode_png(values), "s0.png")

    labels = open_training(root, first_label=1, void=[0, 9]).label_map(0)

    assert labels.tolist() == [[VOID, 0, 1], [2, VOID, VOID]]


@pytest.mark.parametrize("bits", [2, 8])
def test_a_palette_gives_its_numbers_and_not_its_colours(root: Path, bits: int) -> None:
    values = np.array([[0, 1, 2, 2], [2, 1, 0, 0]], np.uint8)
    image = Image.fromarray(values, "P")
    image.putpalette([250, 10, 10, 10, 250, 10, 10, 10, 250])
    content = io.BytesIO()
    image.save(content, "PNG", bits=bits)
    put_map(root, content.getvalue(), "s0.png")

    assert open_training(root).label_map(0).tolist() == values.tolist()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (encode_png(np.zeros((16, 20, 3), np.uint8)), "colour type 2 and 8 bits"),
        (encode_png(np.zeros((16, 20), np.uint16)), "colour type 0 and 16 bits"),
        # Pillow would make 0, 85, 170 and 255 of its values.
        (png(20, 16, 2, 0, bytes(16 * 6)), "colour type 0 and 2 bits"),
    ],
)
def test_a_map_of_colours_or_other_numbers_is_refused(root: Path, content: bytes, found: str) -> None:
    put_map(root, content)
    message = refusal(root)
    assert found in message and "annotations/training/s1.png" in message


def test_a_map_that_is_no_png_is_refused(root: Path) -> None:
    content = io.BytesIO()
    Image.fromarray(np.zeros((16, 20), np.uint8)).save(content, "BMP")
    put_map(root, content.getvalue())
    assert "s1.png is no PNG" in refusal(root)


def test_an_unknown_value_is_refused_with_what_to_set(root: Path) -> None:
    values = np.zeros((16, 20), np.uint8)
    values[3, 4], values[5, 6] = 3, 77
    put_map(root, encode_png(values))

    message = refusal(root)

    assert "annotations/training/s1.png has label 3, 77, but classes are 0 to 2" in message
    assert all(field in message for field in ("data.void", "data.num_classes", "data.first_label"))
    open_training(root, void=[77], num_classes=4).verify()


def test_another_size_than_the_image_is_refused(root: Path) -> None:
    put_map(root, encode_png(np.zeros((16, 19), np.uint8)))

    assert "training/s1.png has 20 x 16 pixels, its map annotations/training/s1.png 19 x 16" in refusal(root)
    with pytest.raises(UserError, match="20 x 16"):
        open_training(root).scene(1, 3)


def test_an_image_without_map_is_named(root: Path) -> None:
    (root / "annotations" / "training" / "s2.png").unlink()
    message = refusal(root)
    assert "1 of 3 images" in message and "s2.png" in message


def test_a_map_without_image_is_named(root: Path) -> None:
    put_map(root, b"", "lonely.png")
    message = refusal(root)
    assert "1 of 4 maps" in message and "lonely.png" in message


def test_two_images_of_one_name_are_refused(root: Path) -> None:
    shutil.copy(root / "images" / "training" / "s0.png", root / "images" / "training" / "s0.jpg")
    assert "s0.jpg and s0.png" in refusal(root)


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_a_missing_folder_is_named(root: Path, kind: str) -> None:
    shutil.rmtree(root / kind / "training")
    assert f"{kind}/training is not a folder" in refusal(root)


def test_one_map_may_be_void_throughout_but_not_all(root: Path) -> None:
    void = encode_png(np.full((16, 20), 255, np.uint8))
    put_map(root, void, "s0.png")
    assert (open_training(root).label_map(0) == VOID).all()

    for name in ("s1.png", "s2.png"):
        put_map(root, void, name)
    assert "all pixels of all 3 maps" in refusal(root)


@pytest.mark.parametrize(
    "content",
    [b"", b"\x89PNG\r\n\x1a\nbroken", encode_png(np.ones((64, 64), np.uint8))[:60]],
    ids=["empty", "no header", "cut off"],
)
def test_a_damaged_map_is_a_bad_sample(root: Path, content: bytes) -> None:
    put_map(root, content)
    source = open_training(root)
    with pytest.raises(BadSample):
        source.label_map(1)
    source.verify()  # passes over it


def test_a_map_that_claims_too_many_pixels_is_not_decoded(root: Path) -> None:
    put_map(root, png(11_000, 10_000, 8, 0, b""))
    with pytest.raises(BadSample) as caught:
        open_training(root).label_map(1)
    assert caught.value.kind == "too-large"


def test_a_test_image_that_is_a_training_image_is_found(root: Path) -> None:
    def files(part: str) -> Any:
        return open_scenes(config(root), part).files

    verify_files(files("training"), files("validation"))
    shutil.copy(root / "images" / "training" / "s1.png", root / "images" / "validation" / "s1.png")
    with pytest.raises(UserError, match=r"s1\.png"):
        verify_files(files("training"), files("validation"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_classes": None}, "num_classes is missing"),
        ({"num_classes": 255, "first_label": 1}, "ends at 255"),
        ({"void": [2]}, "void"),
        ({"void": [256]}, "void"),
        ({"names": ["sky", "road"]}, "2 entries for 3 classes"),
        ({"train": "validation"}, "same folder"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        config(Path("somewhere"), **fields)


def test_classes_without_names_have_numbers() -> None:
    assert config(Path("somewhere")).class_names == ("0", "1", "2")
    assert config(Path("somewhere"), names=["a", "b", "c"]).class_names == ("a", "b", "c")


def test_real_road_scenes(shared_data: Path) -> None:
    source = open_scenes(
        config(shared_data / "camvid", num_classes=11, void=[11], test="testing"), "training"
    )
    assert len(source) == 367
    image, labels = source.scene(0, 3)
    assert image.shape == (3, 360, 480) and labels.shape == (360, 480)
    # The road lies below the sky.
    rows = [(labels == number).nonzero()[:, 0].float().mean() for number in (0, 3)]
    assert rows[0] < 180 < rows[1]
