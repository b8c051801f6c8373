"""Our decoding of photographs against other decoders, on one core: whole, and large ones for a small crop."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image
from torch import Tensor

from benchmarks.comparison import Compare
from benchmarks.report import Report
from benchmarks.timing import Function
from mlomae.data.decoding import decode_image

Decoder = Callable[[bytes], Tensor]

COUNT = {"full-size": 60, "covering-224": 20}
COVERED = 224, 224
ENLARGED = 3
ROUNDS, WARM_UP = 9, 2
AT_LEAST = 1.0
# Of the decoder that is within ours: what lies around it may cost 5 %.
BARE, BARE_AT_LEAST = "simplejpeg", 0.95


# torchvision's decoder gives way to torchcodec's; it is what is installed along with torch.
@pytest.mark.filterwarnings(
    "ignore:The image decoding and encoding capabilities of TorchVision are deprecated"
)
@pytest.mark.parametrize("task", COUNT)
def test_decoders(task: str, photographs: Path, one_thread: None, compare: Compare, report: Report) -> None:
    files = sorted(photographs.glob("*/*"), key=lambda file: file.name)[: COUNT[task]]
    images = [file.read_bytes() for file in files]
    decoders, missing = _find_decoders()
    if task == "full-size":
        least = None
    else:
        images, least = [_enlarge(image) for image in images], COVERED
        decoders |= {"Pillow draft": _pillow_draft, BARE: _simplejpeg_reduced}
    if missing:
        report.say(f"not installed: {', '.join(missing)}")
    compared = compare(
        f"data/decoding/{task}",
        _all(lambda image: decode_image(image, 3, least), images),
        {name: _all(decoder, images) for name, decoder in decoders.items()},
        at_least={name: BARE_AT_LEAST if name == BARE else AT_LEAST for name in decoders},
        rounds=ROUNDS,
        warm_up=WARM_UP,
    )
    report.table(
        f"{task}, {len(images)} JPEGs of {_median_size(images)}, one thread, medians",
        [
            {"decoder": name, "ms/image": 1e3 * seconds / len(images), "ours / it": compared.ratios.get(name)}
            for name, seconds in compared.medians.items()
        ],
    )


def _all(decoder: Decoder, images: Sequence[bytes]) -> Function:
    def decode() -> None:
        for image in images:
            decoder(image)

    return decode


def _enlarge(image: bytes) -> bytes:
    content = io.BytesIO()
    with Image.open(io.BytesIO(image)) as opened:
        size = opened.width * ENLARGED, opened.height * ENLARGED
        opened.convert("RGB").resize(size, Image.Resampling.BICUBIC).save(content, "JPEG", quality=90)
    return content.getvalue()


def _median_size(images: Sequence[bytes]) -> str:
    height, width = np.median([simplejpeg.decode_jpeg_header(image)[:2] for image in images], axis=0)
    return f"{width:.0f} x {height:.0f} pixels"


def _find_decoders() -> tuple[dict[str, Decoder], list[str]]:
    """Those that are installed, each to uint8 [3, H, W] by its shortest way, and the names of the others."""
    decoders: dict[str, Decoder] = {"Pillow": _pillow, BARE: _simplejpeg}
    missing = []
    for name, load in {
        "torchvision": _load_torchvision,
        "torchcodec": _load_torchcodec,
        "PyTurboJPEG": _load_pyturbojpeg,
    }.items():
        try:
            decoders[name] = load()
        except (ImportError, RuntimeError):  # the second where a package misses its library
            missing.append(name)
    return decoders, missing


def _pillow(content: bytes) -> Tensor:
    with Image.open(io.BytesIO(content)) as image:
        return _channels_first(np.array(image.convert("RGB")))


def _pillow_draft(content: bytes) -> Tensor:
    with Image.open(io.BytesIO(content)) as image:
        image.draft("RGB", COVERED[::-1])
        return _channels_first(np.array(image.convert("RGB")))


def _simplejpeg(content: bytes) -> Tensor:
    return _channels_first(simplejpeg.decode_jpeg(content))


def _simplejpeg_reduced(content: bytes) -> Tensor:
    return _channels_first(simplejpeg.decode_jpeg(content, min_height=COVERED[0], min_width=COVERED[1]))


def _load_torchvision() -> Decoder:
    from torchvision.io import ImageReadMode, decode_jpeg

    # A copy of the bytes: torch warns of those that are read-only.
    return lambda content: decode_jpeg(
        torch.frombuffer(bytearray(content), dtype=torch.uint8), ImageReadMode.RGB
    )


def _load_torchcodec() -> Decoder:
    from torchcodec.decoders import decode_jpeg

    return lambda content: decode_jpeg(content, mode="RGB")


def _load_pyturbojpeg() -> Decoder:
    from turbojpeg import TJPF_RGB, TurboJPEG

    decoder = TurboJPEG()
    return lambda content: _channels_first(decoder.decode(content, TJPF_RGB))


def _channels_first(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(2, 0, 1)
