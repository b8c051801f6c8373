from __future__ import annotations

import io
from typing import Any, get_args

import pytest
import torch
from PIL import Image
from torch import Tensor

from mlomae.data.decoding import decode_image
from mlomae.data.transforms import NUM_UNIFORMS, Augment, augment, crop_box, fit, load, normalise
from mlomae.random import counter_uniform

KINDS = get_args(Augment)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def uniforms(rows: int, **columns: float) -> Tensor:
    """Rows of numbers; named columns (top, left, flip) are set to one value."""
    u = counter_uniform(1, 2, 0, (rows, NUM_UNIFORMS))
    for index, name in enumerate(("top", "left", "flip")):
        if name in columns:
            u[:, index] = columns[name]
    return u


def transform(kind: Any, images: Tensor, u: Tensor, size: tuple[int, int]) -> Tensor:
    """The way of images that have been decoded."""
    channels = images.shape[1]
    loaded = [load(image, kind, row, size, channels) for image, row in zip(images, u.tolist(), strict=True)]
    return augment(kind, torch.stack(loaded), u)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "shape, size", [((64, 1, 8, 8), (8, 8)), ((16, 3, 32, 32), (32, 32)), ((8, 3, 20, 30), (16, 12))]
)
def test_an_image_alone_is_augmented_as_in_a_batch(
    kind: Any, shape: tuple[int, ...], size: tuple[int, int]
) -> None:
    images, u = noise(*shape), uniforms(shape[0])
    batched = transform(kind, images, u, size)
    assert batched.shape == (*shape[:2], *size) and batched.dtype == torch.uint8
    for row in range(shape[0]):
        assert torch.equal(transform(kind, images[row : row + 1], u[row : row + 1], size)[0], batched[row])
    if kind != "resized-crop":
        assert torch.equal(augment(kind, fit(images, size), u), batched)


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoded_image_is_treated_as_a_decoded_one(kind: Any) -> None:
    images, u = noise(4, 3, 20, 30), uniforms(4)
    files = [encoded(image, "PNG") for image in images]
    loaded = [load(file, kind, row, (16, 12), 3) for file, row in zip(files, u.tolist(), strict=True)]
    assert torch.equal(augment(kind, torch.stack(loaded), u), transform(kind, images, u, (16, 12)))


@pytest.mark.parametrize("kind", ["none", "resized-crop"])
def test_a_large_jpeg_decoded_at_a_reduced_size_looks_the_same(kind: Any) -> None:
    y, x = torch.meshgrid(torch.arange(600), torch.arange(900), indexing="ij")
    smooth = torch.stack([y / 600, x / 900, (y + x) / 1500]).mul(200).add(20).to(torch.uint8)
    content = encoded(smooth, "JPEG", quality=95)
    for row in uniforms(6).tolist():
        reduced = load(content, kind, row, (32, 32), 3).float()
        whole = load(decode_image(content, 3), kind, row, (32, 32), 3).float()
        assert (reduced - whole).abs().max() <= 6 and (reduced - whole).abs().mean() < 1.5


def encoded(image: Tensor, format: str, **options: Any) -> bytes:
    content = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(content, format, **options)
    return content.getvalue()


@pytest.mark.parametrize("kind", ["shift", "crop-flip", "resized-crop"])
def test_augmentation_varies_between_rows_and_repeats_for_equal_rows(kind: Any) -> None:
    images = noise(1, 3, 16, 16).expand(32, -1, -1, -1)
    u = uniforms(32)
    first = transform(kind, images, u, (16, 16))
    assert torch.equal(first, transform(kind, images, u, (16, 16)))
    assert len({bytes(image.numpy().tobytes()) for image in first}) > 4


def test_none_keeps_an_image_of_the_right_size() -> None:
    images = noise(2, 1, 8, 8)
    assert torch.equal(transform("none", images, uniforms(2), (8, 8)), images)


def test_none_resizes_the_shorter_side_and_crops_the_centre() -> None:
    image = torch.zeros(1, 16, 40, dtype=torch.uint8)
    image[:, :, 12:28] = 200  # the central square
    out = transform("none", image[None], uniforms(1), (8, 8))
    assert out.shape == (1, 1, 8, 8)
    assert (out[0, 0, :, 1:-1].float() - 200).abs().max() <= 15  # bicubic overshoot at the rim only


@pytest.mark.parametrize("top, left, dy, dx", [(0.1, 0.5, -1, 0), (0.5, 0.9, 0, 1), (0.9, 0.1, 1, -1)])
def test_shift_moves_by_whole_pixels_and_repeats_edges(top: float, left: float, dy: int, dx: int) -> None:
    images = noise(2, 1, 6, 7)
    padded = torch.nn.functional.pad(images.float(), (1, 1, 1, 1), mode="replicate").to(torch.uint8)
    expected = padded[:, :, 1 + dy : 7 + dy, 1 + dx : 8 + dx]
    assert torch.equal(transform("shift", images, uniforms(2, top=top, left=left), (6, 7)), expected)


@pytest.mark.parametrize("flip", [0.2, 0.7])
def test_crop_flip_crops_the_reflected_image(flip: float) -> None:
    images = noise(2, 3, 16, 32)
    padded = torch.nn.functional.pad(images.float(), (4, 4, 2, 2), mode="reflect").to(torch.uint8)
    first, last = 2**-24, 1 - 2**-24  # the extremes that counter_uniform can give
    for top, left, y, x in ((first, first, 0, 0), (last, last, 4, 8), (0.5, 0.5, 2, 4)):
        expected = padded[:, :, y : y + 16, x : x + 32]
        expected = expected.flip(3) if flip < 0.5 else expected
        out = transform("crop-flip", images, uniforms(2, top=top, left=left, flip=flip), (16, 32))
        assert torch.equal(out, expected)


@pytest.mark.parametrize("top, left", [(0.0, 0.999), (0.999, 0.0), (0.5, 0.25)])
def test_resized_crop_takes_the_box_at_its_place(top: float, left: float) -> None:
    images, u = noise(1, 3, 40, 30), uniforms(1, top=top, left=left, flip=0.9)
    height, width = crop_box(40, 30, *u[0, 3:].tolist())
    y, x = int(top * (41 - height)), int(left * (31 - width))
    expected = transform("none", images[:, :, y : y + height, x : x + width], u, (height, width))
    assert torch.equal(transform("resized-crop", images, u, (height, width)), expected)


def test_resized_crop_flips_half_of_the_time() -> None:
    images = noise(1, 1, 20, 20)
    plain = transform("resized-crop", images, uniforms(1, flip=0.7), (8, 8))
    flipped = transform("resized-crop", images, uniforms(1, flip=0.3), (8, 8))
    assert torch.equal(plain.flip(3), flipped) and not torch.equal(plain, flipped)


@pytest.mark.parametrize(
    "height, width", [(100, 100), (300, 400), (400, 200), (50, 1000), (1000, 50), (3, 3)]
)
def test_crop_box_fits_and_keeps_its_bounds(height: int, width: int) -> None:
    draws = counter_uniform(3, 0, 0, (500, 2)).tolist()
    boxes = [crop_box(height, width, *draw) for draw in draws]
    for h, w in boxes:
        assert 1 <= h <= height and 1 <= w <= width
    if min(height, width) >= 50:
        assert all(3 / 4 * 0.97 < w / h < 4 / 3 * 1.03 for h, w in boxes)
    if 1 / 2 <= height / width <= 2 and height > 3:  # rounding dominates a side of 3
        shares = torch.tensor([h * w / (height * width) for h, w in boxes])
        assert shares.min() > 0.15 and shares.max() <= 1
        if height == width == 100:
            assert shares.mean() == pytest.approx(0.6, abs=0.03)
            assert shares.max() > 0.95 and shares.min() < 0.25
            ratios = torch.tensor([w / h for h, w in boxes])
            assert ratios.min() < 0.78 and ratios.max() > 1.28
            assert ratios.log().mean() == pytest.approx(0, abs=0.02)


def test_normalise_gives_zero_mean_and_unit_deviation() -> None:
    images = torch.stack([torch.full((4, 4), 51), torch.full((4, 4), 255)]).to(torch.uint8)[None]
    out = normalise(images, (0.2, 0.5), (0.1, 0.25))
    assert out.dtype == torch.float32 and out.shape == (1, 2, 4, 4)
    assert torch.allclose(out[0, :, 0, 0], torch.tensor([0.0, 2.0]), atol=1e-6)
    assert images[0, 1, 0, 0] == 255  # the input is left as it was
