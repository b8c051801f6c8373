"""Shards of small images of noise, some of which are broken, each in a way of its own."""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlomae.data.faults import Kind

Members = list[tuple[str, bytes]]

NUM_CLASSES = 4
SIDE = 16  # pixels


def pixels(number: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """[SIDE, SIDE, 3]: the noise of a sample."""
    return np.random.default_rng(number).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)


def encode(image: Image.Image | np.ndarray[Any, Any], format: str = "PNG", **options: Any) -> bytes:
    content = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(content, format, **options)
    return content.getvalue()


def good(number: int) -> Members:
    """PNG and JPEG by turns."""
    key = f"{number:05d}"
    format, suffix = ("PNG", "png") if number % 2 else ("JPEG", "jpg")
    return [(f"{key}.{suffix}", encode(pixels(number), format)), (f"{key}.cls", label(number))]


def label(number: int) -> bytes:
    return str(number % NUM_CLASSES).encode()


def _image(suffix: str, content: Callable[[int], bytes]) -> Callable[[int], Members]:
    return lambda number: [(f"{number:05d}.{suffix}", content(number)), (f"{number:05d}.cls", label(number))]


def _cut(number: int) -> bytes:
    content = encode(pixels(number), "JPEG")
    return content[: len(content) * 3 // 4]


def _flip_scan(number: int) -> bytes:
    """The header stays, the bits of the image are inverted: they make no codes of the tables any more."""
    content = encode(pixels(number), "JPEG")
    start = content.index(b"\xff\xda") + 14
    scan = bytes(byte ^ 0xFF for byte in content[start:-2])
    return content[:start] + scan.replace(b"\xff", b"\xff\0") + content[-2:]


def _flip_chunk(number: int) -> bytes:
    content = bytearray(encode(pixels(number)))
    for position in range(len(content) // 2, len(content) // 2 + 40):
        content[position] ^= 0xFF
    return bytes(content)


def _bomb(number: int) -> bytes:
    """A PNG of 20,000 x 20,000 pixels, of which it holds a line of zeros."""

    def chunk(name: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(name + content)
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    line = zlib.compress(bytes(60_001))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", line) + chunk(b"IEND", b"")


WAYS: dict[str, tuple[Kind, Callable[[int], Members]]] = {
    "a JPEG cut off": ("damaged", _image("jpg", _cut)),
    "a text file": ("not-an-image", _image("jpg", lambda _: b"404: not found\n")),
    "an empty file": ("empty", _image("png", lambda _: b"")),
    "a PNG with a damaged chunk": ("damaged", _image("png", _flip_chunk)),
    "a JPEG with a damaged scan": ("damaged", _image("jpg", _flip_scan)),
    "an image of one pixel": ("too-small", _image("png", lambda n: encode(pixels(n)[:1, :1]))),
    "a decompression bomb": ("too-large", _image("png", _bomb)),
    "a word as label": ("label", lambda n: [good(n)[0], (f"{n:05d}.cls", b"cat")]),
    "a label without an image": ("no-image", lambda n: [(f"{n:05d}.cls", label(n))]),
    "a way out of the folder": ("path", lambda n: [(f"../../{name}", part) for name, part in good(n)]),
}
MORE_WAYS: dict[str, tuple[Kind, Callable[[int], Members]]] = {
    "random bytes": ("not-an-image", _image("png", lambda n: pixels(n).tobytes())),
    "two images of one name": ("duplicate", lambda n: [good(n)[0], *good(n)]),
}
# What no header tells.
HIDDEN = ("damaged", "not-an-image", "empty", "too-small", "too-large")


def write_shards(
    folder: Path, shards: int, samples: int, bad: Mapping[int, str] | None = None
) -> dict[str, Kind]:
    """Writes ``shards`` files train-000000.tar, … of ``samples`` samples each.

    Args:
        bad: in which way a sample is broken, by its number.

    Returns:
        {key: kind} of the broken ones.
    """
    bad = bad or {}
    kinds: dict[str, Kind] = {}
    for shard in range(shards):
        name = f"train-{shard:06d}.tar"
        parts: list[Members] = []
        for number in range(shard * samples, (shard + 1) * samples):
            if number not in bad:
                parts.append(good(number))
                continue
            kind, members = {**WAYS, **MORE_WAYS}[bad[number]]
            parts.append(members(number))
            key = f"{number:05d}" if kind != "path" else f"../../{number:05d}"
            kinds[f"{name}/{key}"] = kind
        write_tar(folder / name, (member for members in parts for member in members))
    return kinds


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], style: int = tarfile.DEFAULT_FORMAT) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=style) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
