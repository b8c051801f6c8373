"""Images of tests, encoded by Pillow or by hand."""

from __future__ import annotations

import io
import math
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mlomae.data.decoding import decode_image
from mlomae.data.faults import BadSample

HEIGHT, WIDTH = 45, 67  # no multiples of a JPEG's blocks


def picture(mode: str = "RGB", height: int = HEIGHT, width: int = WIDTH) -> Image.Image:
    """Smooth shades with some noise."""
    rows, columns = np.mgrid[:height, :width]
    shades = np.stack(
        [rows * 255 / height, columns * 255 / width, (rows + columns) % 256, 255 - rows * 255 / height], -1
    )
    noise = np.random.default_rng(0).normal(0, 8, shades.shape)
    pixels = np.clip(shades + noise, 0, 255).astype(np.uint8)
    if mode == "CMYK":
        return Image.frombytes("CMYK", (width, height), pixels.tobytes())
    return Image.fromarray(pixels).convert(mode)


def encode(image: Image.Image, format: str, **options: Any) -> bytes:
    """A file's bytes."""
    content = io.BytesIO()
    image.save(content, format, **options)
    return content.getvalue()


def by_pillow(content: bytes, mode: str = "RGB") -> torch.Tensor:
    """uint8 [C, H, W], decoded the long way."""
    with Image.open(io.BytesIO(content)) as image:
        pixels = np.array(image.convert(mode))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def png(width: int, height: int, bits: int, colours: int, rows: bytes) -> bytes:
    """A PNG written by hand; ``rows`` may be too short."""
    header = struct.pack(">2I5B", width, height, bits, colours, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks
    )


def flat_jpeg(
    height: int, width: int, mode: str, block_bits: str, blocks: int, sampling: int = 0x11
) -> bytes:
    """A JPEG of one shade: a small one's header with another size, and ``blocks`` times the same bits."""
    small = encode(Image.new("RGB", (16, 16), (128, 128, 128)).convert(mode), "JPEG", subsampling=0)
    frame, scan = small.index(b"\xff\xc0"), small.index(b"\xff\xda")
    header = bytearray(small[: scan + 2 + int.from_bytes(small[scan + 2 : scan + 4])])
    header[frame + 5 : frame + 9] = struct.pack(">2H", height, width)
    header[frame + 11] = sampling
    together = 8 // math.gcd(len(block_bits), 8)  # as many blocks as fill whole bytes
    unit = int(block_bits * together, 2).to_bytes(len(block_bits) * together // 8)
    return bytes(header) + unit * (blocks // together) + b"\xff\xd9"


def kind_of(content: bytes, least: tuple[int, int] | None = None) -> str:
    """Why an image is refused."""
    with pytest.raises(BadSample) as caught:
        decode_image(content, 3, least)
    assert caught.value.reason and "\n" not in caught.value.reason
    return caught.value.kind
