"""Decoding of one image file to uint8 pixels: libjpeg-turbo for JPEG, Pillow for all else."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from mlomae.data.faults import BadSample

if TYPE_CHECKING:
    from PIL.Image import Image

MODES = {1: "L", 3: "RGB"}  # channels → Pillow mode
MIN_SIDE = 2  # pixels: a single row or column of them is no picture
MAX_PIXELS = 100_000_000
"""Of the image as it is decoded: 300 MB in colour, and about three times that while a decoder works on it.
Photographs have fewer, but a file of some kilobytes can claim 65,535 x 65,535."""

_Pixels = np.ndarray[Any, np.dtype[np.uint8]]  # [H, W, C]
# Every block of 8x8 pixels takes at least one bit of a JPEG (arithmetic coding aside, which nobody uses).
_MOST_PIXELS_PER_BYTE = 8 * 64
# Of a JPEG's sides. Others are slower: libjpeg-turbo has vector code for these.
_REDUCTIONS = (8, 4, 2)
# Pillow's formats by their first bytes. It knows more, some of which start other programs or match any bytes.
_SIGNATURES = re.compile(
    rb"(?P<JPEG>\xff\xd8\xff)|(?P<PNG>\x89PNG\r\n\x1a\n)|(?P<GIF>GIF8[79]a)|(?P<WEBP>RIFF.{4}WEBP)"
    rb"|(?P<TIFF>II[*+]\0|MM\0[*+])|(?P<BMP>BM)|(?P<PPM>P[1-6]\s)|(?P<AVIF>.{4}ftypavi[fs])"
    rb"|(?P<JPEG2000>\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51)",
    re.DOTALL,
)
_IGNORE_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
_BITS_PER_SAMPLE = 258  # tag of a TIFF


def image_size(content: bytes) -> tuple[int, int]:
    """(height, width) from the header alone, in microseconds; what follows it may still be damaged.

    Raises:
        BadSample: there is no readable header.
    """
    format = _find_format(content)
    header = _read_jpeg_header(content) if format == "JPEG" else None
    if header is not None:
        return header[:2]
    with _open_by_pillow(content, format) as image:
        return image.height, image.width


def decode_image(content: bytes, in_chans: int, least: tuple[int, int] | None = None) -> Tensor:
    """Decodes the first frame of an image and converts it to grey (1 channel) or RGB (3).

    As Pillow converts it, with two exceptions: pixels of 16 bits are scaled to 8, and grey from a colour JPEG
    is the brightness that the file holds. Threads may call this at once.

    Args:
        content: the encoded file.
        in_chans: a key of ``MODES``.
        least: height and width. A JPEG comes at 1/2, 1/4 or 1/8 of its size, rounded up, where neither side
            falls below these.

    Returns:
        uint8 [in_chans, H, W] with memory of its own, where the channels of a pixel may lie side by side.

    Raises:
        BadSample: the bytes are no image, a damaged one, or one of too few or too many pixels. Where libjpeg
            would only warn and fill up with grey what is missing, the image is damaged.
    """
    format = _find_format(content)
    header = _read_jpeg_header(content) if format == "JPEG" else None
    if header is None:
        pixels = _decode_by_pillow(content, format, in_chans, least)
    else:
        pixels = _decode_jpeg(content, *header, in_chans, least)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _find_format(content: bytes) -> str:
    if not content:
        raise BadSample("empty", "no bytes")
    match = _SIGNATURES.match(content)
    if match is None or match.lastgroup is None:
        raise BadSample("not-an-image", f"starts with {content[:8]!r}, as no known image format does")
    return match.lastgroup


def _check_size(height: int, width: int, decoded_pixels: int) -> None:
    if min(height, width) < MIN_SIDE:
        raise BadSample("too-small", f"{width} x {height} pixels; a side needs at least {MIN_SIDE}")
    if decoded_pixels > MAX_PIXELS:
        raise BadSample("too-large", f"{width} x {height} pixels, more than {MAX_PIXELS} to decode")


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _read_jpeg_header(content: bytes) -> tuple[int, int, str] | None:
    """Height, width and colour space; None when damaged, or when its colours are sampled in a rare way."""
    import simplejpeg

    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
    except MemoryError:
        raise
    except Exception:  # ValueError by its documentation, KeyError by trial
        return None
    return int(height), int(width), str(colours)


def _decode_jpeg(
    content: bytes, height: int, width: int, colours: str, in_chans: int, least: tuple[int, int] | None
) -> _Pixels:
    import simplejpeg

    reduced_height, reduced_width = _reduce(height, width, least)
    _check_size(height, width, _count_pixels(content, (height, width), (reduced_height, reduced_width)))
    if height * width > _MOST_PIXELS_PER_BYTE * len(content):
        # libjpeg would make up the rest, at the cost of a whole image.
        raise BadSample("damaged", f"{len(content)} bytes cannot hold {width} x {height} pixels")
    is_cmyk = colours in ("CMYK", "YCCK")
    try:
        # Without the faster DCT and upsampling the pixels are Pillow's. They save 5 % of the time, and change
        # photographs by 1.3 of 255 on average and by up to 56.
        pixels: _Pixels = simplejpeg.decode_jpeg(
            content,
            "CMYK" if is_cmyk else {1: "GRAY", 3: "RGB"}[in_chans],
            min_height=reduced_height,
            min_width=reduced_width,
        )
    except MemoryError:
        raise
    except Exception as error:
        raise BadSample("damaged", _one_line(error)) from None
    return _convert_cmyk(pixels, in_chans) if is_cmyk else pixels


def _reduce(height: int, width: int, least: tuple[int, int] | None) -> tuple[int, int]:
    if least is not None:
        for factor in _REDUCTIONS:
            reduced = -(-height // factor), -(-width // factor)
            if reduced[0] >= least[0] and reduced[1] >= least[1]:
                return reduced
    return height, width


def _count_pixels(content: bytes, full: tuple[int, int], reduced: tuple[int, int]) -> int:
    """Pixels of a JPEG that lie in memory at once while it is decoded at a reduced size."""
    pixels = full[0] * full[1]
    if pixels <= MAX_PIXELS or _has_several_scans(content):
        return pixels
    return reduced[0] * reduced[1]


def _has_several_scans(content: bytes) -> bool:
    """Whether a JPEG is progressive or comes channel by channel: libjpeg then keeps it at full size."""
    position, channels = 2, 0
    while position + 10 <= len(content):
        marker = content[position + 1]
        if content[position] != 0xFF or not (0xC0 <= marker < 0xD0 or 0xDA <= marker < 0xFF):
            break  # odd, if allowed
        if marker in (0xC0, 0xC1):  # a frame whose blocks come in order
            channels = content[position + 9]
        elif marker < 0xD0 and marker not in (0xC4, 0xC8, 0xCC):  # a frame of another kind
            break
        elif marker == 0xDA:  # a scan
            return content[position + 4] < channels
        position += 2 + int.from_bytes(content[position + 2 : position + 4])
    return True


def _convert_cmyk(pixels: _Pixels, in_chans: int) -> _Pixels:
    from PIL import Image

    height, width, _ = pixels.shape
    # Inverted, as Adobe writes it and Pillow reads it.
    image = Image.frombuffer("CMYK", (width, height), pixels, "raw", "CMYK;I", 0, 1)
    return _convert(image, in_chans)


def _decode_by_pillow(content: bytes, format: str, in_chans: int, least: tuple[int, int] | None) -> _Pixels:
    with _open_by_pillow(content, format) as image:
        full = image.height, image.width
        size = None if least is None else (least[1], least[0])
        image.draft(MODES[in_chans], size)  # only a JPEG follows it
        _check_size(*full, _count_pixels(content, full, (image.height, image.width)))
        return _convert(to_8_bits(image), in_chans)


@contextmanager
def _open_by_pillow(content: bytes, format: str) -> Iterator[Image]:
    """Opens an image; whatever Pillow raises on it, also later, becomes a BadSample."""
    from PIL import Image, UnidentifiedImageError

    # Pillow warns of metadata that nobody reads here, and of sizes that are checked here. The filter stays:
    # catch_warnings is not safe with threads.
    if warnings.filters[:1] != [_IGNORE_PILLOW]:
        warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        with Image.open(io.BytesIO(content), formats=(format,)) as image:
            yield image
    except (BadSample, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadSample("too-large", _one_line(error)) from None
    except UnidentifiedImageError:
        raise BadSample("damaged", f"starts as {format} does, but its header cannot be read") from None
    except Exception as error:  # Pillow's plug-ins raise nearly every type on damaged bytes
        raise BadSample("damaged", _one_line(error)) from None


def to_8_bits(image: Image) -> Image:
    """The image, its 16 bits scaled; Pillow would clip them, and nearly all pixels would be white."""
    from PIL import Image

    # Pillow makes 32 bits of a PGM's 16. The range of others is not known.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        bits = getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]  # a TIFF's may be 12
        return Image.fromarray((np.asarray(image) >> (bits - 8)).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise BadSample("not-an-image", f"pixels of mode {image.mode}, not 8 or 16 bits")
    return image


def _convert(image: Image, in_chans: int) -> _Pixels:
    pixels: _Pixels = np.array(image if image.mode == MODES[in_chans] else image.convert(MODES[in_chans]))
    return pixels.reshape(image.height, image.width, in_chans)
