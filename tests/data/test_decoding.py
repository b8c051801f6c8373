"""Decoding of image files: every format against Pillow, and at reduced sizes."""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image

from mlomae.data.decoding import decode_image, image_size
from mlomae.data.faults import BadSample
from tests.data.pictures import HEIGHT, WIDTH, by_pillow, encode, flat_jpeg, kind_of, picture, png


@pytest.mark.parametrize(
    "format, mode, options",
    [
        ("JPEG", "RGB", {}),
        ("JPEG", "RGB", {"subsampling": 0, "quality": 95}),
        ("JPEG", "RGB", {"subsampling": 1, "restart_marker_blocks": 2}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "RGB", {"keep_rgb": True}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("MPO", "RGB", {"save_all": True, "append_images": [Image.new("RGB", (WIDTH, HEIGHT))]}),
        *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        ("GIF", "P", {}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGBA", {"lossless": True}),
        ("TIFF", "RGB", {"compression": "tiff_lzw"}),
        ("TIFF", "CMYK", {}),
        ("BMP", "RGB", {}),
        ("PPM", "RGB", {}),
        ("PPM", "L", {}),
        ("JPEG2000", "RGB", {}),
        ("AVIF", "RGB", {}),
    ],
)
def test_pixels_are_those_of_pillow(format: str, mode: str, options: dict[str, Any]) -> None:
    if format not in Image.registered_extensions().values():
        pytest.skip(f"Pillow without {format}")
    content = encode(picture(mode), format, **options)
    assert image_size(content) == (HEIGHT, WIDTH)
    colour = decode_image(content, 3)
    assert colour.dtype == torch.uint8 and torch.equal(colour, by_pillow(content))
    grey = decode_image(content, 1)
    assert grey.shape == (1, HEIGHT, WIDTH) and grey.dtype == torch.uint8
    difference = (grey.int() - by_pillow(content, "L").int()).abs()
    if format in ("JPEG", "MPO"):  # the brightness in the file, without a detour by clipped colours
        assert difference.float().mean() <= 0.5
    else:
        assert difference.max() == 0


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("in_chans", [1, 3])
@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_pixels_have_memory_of_their_own(format: str, mode: str, in_chans: int) -> None:
    content = encode(picture(mode), format)
    pixels = decode_image(content, in_chans)
    before = pixels.clone()
    pixels[0] ^= 255  # raises where the memory is read-only, changes other channels where they share it
    assert torch.equal(pixels[1:], before[1:])
    assert torch.equal(decode_image(content, in_chans), before)


def test_grey_of_a_colour_jpeg_is_its_brightness() -> None:
    content = encode(picture(), "JPEG")
    with Image.open(io.BytesIO(content)) as image:
        image.draft("L", None)
        expected = torch.from_numpy(np.array(image))
    assert torch.equal(decode_image(content, 1)[0], expected)


def test_ycck_jpeg() -> None:
    content = simplejpeg.encode_jpeg(np.array(picture("CMYK")), colorspace="CMYK")
    assert simplejpeg.decode_jpeg_header(content)[2] == "YCCK"
    assert torch.equal(decode_image(content, 3), by_pillow(content))
    assert torch.equal(decode_image(content, 1), by_pillow(content, "L"))


def test_jpeg_of_a_rare_sampling() -> None:
    # 4:1:0: eight blocks of brightness, two of colour; four of these make the image.
    content = flat_jpeg(32, 64, "RGB", "001010" * 8 + "0000" * 2, 4, sampling=0x42)
    with pytest.raises(ValueError, match="subsampling"):
        simplejpeg.decode_jpeg_header(content)
    assert image_size(content) == (32, 64)
    assert torch.equal(decode_image(content, 3), torch.full((3, 32, 64), 128, dtype=torch.uint8))
    assert decode_image(content, 1, least=(8, 10)).shape == (1, 8, 16)
    assert kind_of(content[:-6]) == "damaged"


@pytest.mark.parametrize(
    "least, factor",
    [
        (None, 1),
        ((90, 130), 1),
        ((46, 10), 1),
        ((500, 1), 1),
        ((45, 65), 2),
        ((10, 34), 2),
        ((23, 33), 4),
        ((12, 17), 8),
        ((1, 1), 8),
    ],
)
@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_least_size(least: tuple[int, int] | None, factor: int, options: dict[str, Any]) -> None:
    content = encode(picture(height=90, width=130), "JPEG", **options)
    pixels = decode_image(content, 3, least)
    assert tuple(pixels.shape) == (3, -(-90 // factor), -(-130 // factor))
    assert decode_image(content, 1, least).shape[1:] == pixels.shape[1:]
    with Image.open(io.BytesIO(content)) as image:
        image.draft("RGB", (130 // factor, 90 // factor))
        assert torch.equal(pixels, torch.from_numpy(np.array(image)).permute(2, 0, 1))


def test_least_size_of_other_formats_is_the_whole() -> None:
    assert decode_image(encode(picture(), "PNG"), 3, least=(5, 5)).shape == (3, HEIGHT, WIDTH)


def _tiff_of_12_bits(values: list[int]) -> bytes:
    """One row of grey, two values in three bytes."""
    packed = b"".join(((a << 12) | b).to_bytes(3) for a, b in zip(values[::2], values[1::2], strict=True))
    data = packed * 2
    tags = [(256, len(values)), (257, 2), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 2)]
    tags.append((279, len(data)))
    entries = b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags
    )
    return (
        b"II*\0"
        + struct.pack("<I", 8 + len(data))
        + data
        + struct.pack("<H", len(tags))
        + entries
        + b"\0" * 4
    )


VALUES = [0, 255, 256, 511, 0x1234, 0x8000, 0xFF00, 0xFFFF]


@pytest.mark.parametrize(
    "content",
    [
        encode(Image.fromarray(np.array([VALUES] * 2, dtype=np.uint16)), "PNG"),
        encode(Image.fromarray(np.array([VALUES] * 2, dtype=np.uint16)), "TIFF"),
        b"P5 8 2 65535\n" + struct.pack(">16H", *VALUES, *VALUES),
        encode(Image.fromarray(np.array([VALUES] * 2, dtype=np.uint16)), "JPEG2000"),
        png(8, 2, 16, 2, (b"\0" + struct.pack(">24H", *np.repeat(VALUES, 3))) * 2),
        png(8, 2, 16, 4, (b"\0" + struct.pack(">16H", *(v for value in VALUES for v in (value, 0)))) * 2),
        _tiff_of_12_bits([value >> 4 for value in VALUES]),
    ],
    ids=["png", "tiff", "pgm", "jpeg2000", "colour-png", "png-with-alpha", "tiff-of-12-bits"],
)
def test_16_bits_are_scaled(content: bytes) -> None:
    expected = torch.tensor([VALUES] * 2) >> 8
    assert torch.equal(decode_image(content, 1)[0].long(), expected)
    assert torch.equal(decode_image(content, 3).long(), expected.expand(3, -1, -1))


@pytest.mark.parametrize("dtype, mode", [(np.float32, "F"), (np.int32, "I")])
def test_pixels_without_a_range_are_refused(dtype: Any, mode: str) -> None:
    content = encode(Image.fromarray(np.ones((4, 4), dtype=dtype)), "TIFF")
    with pytest.raises(BadSample, match=f"pixels of mode {mode}, not 8 or 16 bits") as caught:
        decode_image(content, 3)
    assert caught.value.kind == "not-an-image"


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_first_frame(format: str) -> None:
    shades = [40, 120, 200]
    frames = [Image.new("RGB", (WIDTH, HEIGHT), (shade,) * 3) for shade in shades]
    content = encode(frames[0], format, save_all=True, append_images=frames[1:])
    pixels = decode_image(content, 3)
    assert pixels.shape == (3, HEIGHT, WIDTH) and (pixels.int() - shades[0]).abs().max() <= 2


def _with_transparency() -> bytes:
    return encode(picture("P"), "PNG", transparency=bytes(range(200)))


def _with_broken_exif() -> bytes:
    content = encode(picture(), "TIFF")
    directory = int.from_bytes(content[4:8], "little")
    last = directory + 2 + 12 * (int.from_bytes(content[directory : directory + 2], "little") - 1)
    # A text that would lie beyond the end of the file.
    entry = struct.pack("<HHII", 65000, 2, 10_000, len(content) - 4)
    return content[:last] + entry + content[last + 12 :]


def _above_pillows_warning() -> bytes:
    return png(12_000, 8_000, 1, 0, b"")


@pytest.mark.parametrize("make", [_with_transparency, _with_broken_exif, _above_pillows_warning])
def test_warnings_of_pillow_do_not_escape(make: Callable[[], bytes]) -> None:
    content = make()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with Image.open(io.BytesIO(content)) as image:
            if image.width < 1_000:
                image.convert("RGB")
        assert caught, "Pillow no longer warns of this"
        caught.clear()
        image_size(content)
        if make is not _above_pillows_warning:
            assert decode_image(content, 3).shape == (3, HEIGHT, WIDTH)
        assert not caught
        warnings.warn("of somebody else", stacklevel=1)
        assert caught


def test_threads() -> None:
    contents = [
        encode(picture(mode), format)
        for mode, format in (("RGB", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("RGB", "WEBP"))
    ]
    contents += [_with_transparency(), contents[0][:-50]]

    def attempt(content: bytes) -> torch.Tensor | str:
        try:
            return decode_image(content, 3)
        except BadSample as error:
            return error.kind

    expected = [attempt(content) for content in contents]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(attempt, contents * 40))
    for number, result in enumerate(results):
        wanted = expected[number % len(contents)]
        if isinstance(wanted, str):
            assert result == wanted
        else:
            assert isinstance(result, torch.Tensor) and torch.equal(result, wanted)


def test_photographs(shared_data: Path) -> None:
    files = sorted((shared_data / "imagenet_sample").glob("train/*/*"))
    assert len(files) > 100
    for file in files:
        content = file.read_bytes()
        expected = by_pillow(content)
        assert image_size(content) == expected.shape[1:]
        # Exactly: both are libjpeg-turbo, with the same options.
        assert torch.equal(decode_image(content, 3), expected), file.name
        grey = (decode_image(content, 1).int() - by_pillow(content, "L").int()).abs().float()
        assert grey.mean() < 0.5, file.name  # measured: 0.18 where many colours are clipped
