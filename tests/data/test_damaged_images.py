"""Bytes that are no whole image, or one of too many pixels: refused by name, in bounded memory."""

from __future__ import annotations

import resource
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import pytest
import simplejpeg
import torch
from PIL import Image

from mlomae.data import decoding
from mlomae.data.decoding import decode_image, image_size
from mlomae.data.faults import BadSample
from tests.data.pictures import HEIGHT, WIDTH, by_pillow, encode, flat_jpeg, kind_of, picture, png

HUGE = 20_000


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_too_small(format: str) -> None:
    for width, height in ((1, 9), (9, 1), (1, 1)):
        assert kind_of(encode(Image.new("RGB", (width, height)), format)) == "too-small"
    assert decode_image(encode(Image.new("RGB", (2, 2)), format), 3).shape == (3, 2, 2)


def test_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    for side in (10_001, HUGE):  # the second is beyond Pillow's own limit
        assert kind_of(png(side, side, 1, 0, b"")) == "too-large"
    exact, jpeg = (encode(picture(), format) for format in ("PNG", "JPEG"))
    progressive = encode(picture(), "JPEG", progressive=True)
    monkeypatch.setattr(decoding, "MAX_PIXELS", HEIGHT * WIDTH)
    assert decode_image(exact, 3).shape == decode_image(jpeg, 3).shape == (3, HEIGHT, WIDTH)
    monkeypatch.setattr(decoding, "MAX_PIXELS", HEIGHT * WIDTH - 1)
    assert kind_of(exact) == kind_of(jpeg) == kind_of(jpeg, (HEIGHT, 1)) == "too-large"
    assert kind_of(progressive, (9, 9)) == "too-large"
    assert decode_image(jpeg, 3, (9, 9)).shape == (3, 12, 17)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 12 * 17 - 1)
    assert kind_of(jpeg, (9, 9)) == "too-large"


def test_huge_jpeg_is_decoded_at_a_small_size_only() -> None:
    content = flat_jpeg(HUGE, HUGE, "L", "001010", (HUGE // 8) ** 2)  # valid to the last block: 4.7 MB
    assert image_size(content) == (HUGE, HUGE)
    before = _peak_bytes()
    assert kind_of(content) == "too-large"
    pixels = decode_image(content, 1, (200, 200))
    assert tuple(pixels.shape) == (1, HUGE // 8, HUGE // 8) and bool((pixels == 128).all())
    progressive = content.replace(b"\xff\xc0", b"\xff\xc2")
    assert kind_of(progressive, (200, 200)) == "too-large"
    header, _, _ = flat_jpeg(HUGE, HUGE, "RGB", "00000000", 1).partition(b"\xff\xda")
    by_channel = header + bytes.fromhex("ffda 0008 01 0100 003f00 00")  # a scan of the first channel only
    assert kind_of(by_channel, (200, 200)) == "too-large"
    assert kind_of(content[:1000], (200, 200)) == "damaged"
    assert _peak_bytes() - before < 200e6


def test_jpeg_that_cannot_hold_its_pixels_is_not_decoded() -> None:
    content = flat_jpeg(9_000, 9_000, "L", "001010", 4)
    before = _peak_bytes()
    with pytest.raises(BadSample, match=r"\d+ bytes cannot hold 9000 x 9000 pixels") as caught:
        decode_image(content, 3)
    assert caught.value.kind == "damaged"
    assert _peak_bytes() - before < 100e6


@pytest.mark.parametrize(
    "content, kind",
    [
        (b"", "empty"),
        (b"\0", "not-an-image"),
        (b"<html><body>404 Not Found</body></html>", "not-an-image"),
        (bytes(1000), "not-an-image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not-an-image"),
        (b"\xff\xd8\xff\xe0", "damaged"),
        (b"\x89PNG\r\n\x1a\n", "damaged"),
        (b"GIF89a", "damaged"),
        (b"II*\0\x08\0\0\0", "damaged"),
    ],
)
def test_bytes_that_are_no_image(content: bytes, kind: str) -> None:
    assert kind_of(content) == kind
    with pytest.raises(BadSample) as caught:
        image_size(content)
    assert caught.value.kind == kind


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 3}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_truncated_jpeg_is_damaged(mode: str, options: dict[str, Any]) -> None:
    content = encode(picture(mode), "JPEG", **options)
    for length in {*range(3, len(content), 37), *range(len(content) - 12, len(content))}:
        assert kind_of(content[:length]) == kind_of(content[:length], (10, 10)) == "damaged", length
    assert torch.equal(decode_image(content + b"more", 3), decode_image(content, 3))


@pytest.mark.parametrize("format", ["PNG", "GIF", "WEBP", "TIFF", "BMP", "PPM", "JPEG2000"])
def test_other_truncated_images(format: str) -> None:
    content = encode(picture(), format)
    expected = by_pillow(content)
    refused = 0
    for length in range(12, len(content), len(content) // 60):
        try:
            # Bytes after the last pixel may be missing.
            assert torch.equal(decode_image(content[:length], 3), expected)
        except BadSample as error:
            assert error.kind == "damaged"
            refused += 1
    assert refused > 50


@pytest.mark.parametrize("options", [{}, {"progressive": True}])
def test_jpeg_that_libjpeg_only_warns_of_is_damaged(options: dict[str, Any]) -> None:
    content = bytearray(encode(picture(), "JPEG", **options))
    middle = (content.index(b"\xff\xda") + len(content)) // 2
    content[middle : middle + 2] = b"\xff\xd3"  # a restart that nobody announced
    assert by_pillow(bytes(content)).shape == (3, HEIGHT, WIDTH)  # wrong pixels, no error
    assert kind_of(bytes(content)) == "damaged"


class _Odd(Exception):
    pass


@pytest.mark.parametrize(
    "error", [_Odd("two\nlines"), AssertionError(), struct.error("short"), OSError(5, "x")]
)
def test_every_error_of_a_library_is_a_bad_sample(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_with(error, monkeypatch)
    for format in ("JPEG", "PNG"):
        assert kind_of(encode(picture(), format)) == "damaged"


@pytest.mark.parametrize("error", [MemoryError, KeyboardInterrupt])
def test_errors_that_are_not_the_images(error: type, monkeypatch: pytest.MonkeyPatch) -> None:
    _fail_with(error(), monkeypatch)
    for format in ("JPEG", "PNG"):
        with pytest.raises(error):
            decode_image(encode(picture(), format), 3)


def _fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(simplejpeg, "decode_jpeg", fail)
    monkeypatch.setattr(PIL.Image.Image, "draft", fail)


def _mutations(content: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Bits flipped, pieces cut out or put in, bytes of the header changed; a PNG's checksums are repaired."""
    rng = np.random.default_rng(seed)
    header = min(len(content), 700 if content.startswith(b"\xff\xd8") else 60)
    for number in range(count):
        changed = bytearray(content)
        start, length = int(rng.integers(len(content))), int(rng.integers(1, 40))
        match number % 5:
            case 0:
                for position in rng.integers(len(content), size=int(rng.integers(1, 9))):
                    changed[position] ^= 1 << int(rng.integers(8))
            case 1:
                del changed[start:]
            case 2:
                del changed[start : start + length]
            case 3:
                changed[start:start] = rng.bytes(length)
            case 4:
                for position in rng.integers(2, header, size=int(rng.integers(1, 4))):
                    changed[position] = int(rng.choice([0, 1, 0x7F, 0xFF, rng.integers(256)]))
        yield _repaired(bytes(changed)) if rng.random() < 0.7 else bytes(changed)


def _repaired(content: bytes) -> bytes:
    """The PNG with checksums that fit, so that a decoder looks at what was changed."""
    if not content.startswith(b"\x89PNG\r\n\x1a\n"):
        return content
    position, repaired = 8, content[:8]
    while position + 12 <= len(content):
        end = position + 8 + int.from_bytes(content[position : position + 4])
        repaired += content[position:end] + struct.pack(">I", zlib.crc32(content[position + 4 : end]))
        position = end + 4
    return repaired


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_mutated_images_are_decoded_or_refused(format: str) -> None:
    if format == "JPEG":
        originals = [encode(picture(mode), format) for mode in ("RGB", "L", "CMYK")]
        originals.append(encode(picture(), format, progressive=True))
    else:
        originals = [encode(picture(mode), format) for mode in ("RGB", "P", "1", "LA")]
        originals.append(png(8, 2, 16, 2, (b"\0" + bytes(48)) * 2))
        originals.append(encode(picture(), format, save_all=True, append_images=[picture("RGB")]))
    before = _peak_bytes()
    outcomes = {True: 0, False: 0}
    for seed, original in enumerate(originals):
        for number, content in enumerate(_mutations(original, 150, seed)):
            in_chans = 1 + 2 * (number % 2)
            least = (8, 8) if number % 3 == 0 else None
            try:
                pixels = decode_image(content, in_chans, least)
            except BadSample as error:
                assert error.reason and "\n" not in error.reason
                outcomes[False] += 1
                continue
            height, width = image_size(content)
            if least is not None and format == "JPEG":
                assert pixels.shape[1] >= min(8, height) and pixels.shape[2] >= min(8, width)
            else:
                assert pixels.shape[1:] == (height, width)
            assert pixels.shape[0] == in_chans and pixels.dtype == torch.uint8
            outcomes[True] += 1
    assert min(outcomes.values()) > 20
    assert _peak_bytes() - before < 500e6
