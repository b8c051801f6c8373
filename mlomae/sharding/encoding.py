"""How images are stored in shards: as the bytes that they came in, unless something else is asked for."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mlomae.data.decoding import decode_image, image_size
from mlomae.data.faults import BadSample
from mlomae.data.shards.scan import IMAGE_SUFFIXES

if TYPE_CHECKING:
    from PIL.Image import Image

Format = Literal["keep", "jpg", "png", "webp"]

_PILLOW_FORMATS = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


@dataclass(frozen=True)
class Encoding:
    """How images are stored.

    Attributes:
        format: keep leaves JPEG, PNG and WebP as they are, and makes PNG of everything else.
        resize: the shorter side, in pixels, of images that are larger; None leaves all as they are.
        quality: of the JPEG and WebP files that are written, 1 to 100.
        check: decode also those images of which only bytes are copied.
    """

    format: Format = "keep"
    resize: int | None = None
    quality: int = 92
    check: bool = True


@dataclass(frozen=True)
class Encoded:
    """An image as a file: its bytes, and the suffix that tells their format."""

    content: bytes
    suffix: str
    width: int
    height: int


def encode(picture: bytes | Image, name: str, encoding: Encoding) -> Encoded:
    """The file to be stored.

    Pixels that are written anew are 8-bit grey or RGB, as training sees them.

    Args:
        picture: an encoded file, or pixels.
        name: of the file; tells its suffix.

    Raises:
        BadSample: the image cannot be decoded, or not be written in this format.
    """
    if isinstance(picture, bytes):
        return _encode_file(picture, name, encoding)
    grey = picture.mode in ("1", "L", "LA")
    pixels = picture.convert("L" if grey else "RGB")
    return _write(pixels, "png" if encoding.format == "keep" else encoding.format, encoding)


def find_kind(content: bytes) -> str | None:
    """jpg, png or webp by the first bytes; None of anything else."""
    if content.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    return "webp" if content[:4] == b"RIFF" and content[8:12] == b"WEBP" else None


def _encode_file(content: bytes, name: str, encoding: Encoding) -> Encoded:
    from PIL import Image

    height, width = image_size(content)
    kind = find_kind(content)
    wanted = (kind or "png") if encoding.format == "keep" else encoding.format
    target = _shrunk(width, height, encoding.resize)
    if wanted == kind and target == (width, height):
        if encoding.check:
            decode_image(content, 3)
        suffix = name.rpartition(".")[2].lower()
        keeps_suffix = encoding.format == "keep" and suffix in IMAGE_SUFFIXES
        return Encoded(content, suffix if keeps_suffix else kind, width, height)
    # Twice the target leaves the filter enough to average over.
    least = None if target == (width, height) else (2 * target[1], 2 * target[0])
    pixels = decode_image(content, 3, least).permute(1, 2, 0).numpy()
    grey = (pixels == pixels[..., :1]).all()
    return _write(Image.fromarray(pixels[..., 0] if grey else pixels), wanted, encoding, target)


def _write(image: Image, kind: str, encoding: Encoding, target: tuple[int, int] | None = None) -> Encoded:
    """The image in its ``target`` size: width, height."""
    from PIL.Image import Resampling

    target = target or _shrunk(image.width, image.height, encoding.resize)
    if target != image.size:
        image = image.resize(target, Resampling.BICUBIC)  # averages over the pixels that it drops
    content = io.BytesIO()
    options = {} if kind == "png" else {"quality": encoding.quality}
    try:
        image.save(content, _PILLOW_FORMATS[kind], **options)
    except (OSError, ValueError) as error:  # JPEG and WebP have a longest side
        reason = " ".join(str(error).split())
        found = f"{image.width} x {image.height} pixels cannot be written as {kind} ({reason})"
        raise BadSample("too-large", found) from None
    return Encoded(content.getvalue(), kind, *target)


def _shrunk(width: int, height: int, resize: int | None) -> tuple[int, int]:
    """Width and height once the shorter side is at most ``resize``."""
    shorter = min(width, height)
    if resize is None or shorter <= resize:
        return width, height
    return round(width * resize / shorter), round(height * resize / shorter)
