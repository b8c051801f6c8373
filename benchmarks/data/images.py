"""Pictures as image folders and as shards: of CIFAR's size, and photographs; given or synthetic ones."""

from __future__ import annotations

import random
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.peers.problem import write_images

NUM_PHOTOGRAPHS = 240
NUM_CLASSES = 10
# Height and width of the median photograph of ImageNet; the spectrum and the quality make it as many bytes.
_SIZE = 375, 500
_SLOPE, _QUALITY = 1.2, 90


def pack(folder: Path, target: Path, shards: int = 1) -> None:
    """Writes the images of class folders ``*-NUMBER`` into WebDataset shards, classes mixed."""
    from webdataset import TarWriter

    files = sorted(folder.glob("*/*"))
    random.Random(0).shuffle(files)
    target.mkdir(parents=True, exist_ok=True)
    for shard in range(shards):
        with TarWriter(str(target / f"train-{shard:04d}.tar")) as writer:
            for file in files[shard::shards]:
                label = file.parent.name.rpartition("-")[2].encode()
                suffix = file.suffix.removeprefix(".")
                writer.write({"__key__": file.stem, "cls": label, suffix: file.read_bytes()})


def unpack(shard: Path, folder: Path) -> None:
    """Writes the images of one shard into class folders."""
    images: dict[str, tuple[str, bytes]] = {}
    labels: dict[str, str] = {}
    with tarfile.open(shard) as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            file = tar.extractfile(member)
            if file is None:
                continue
            if suffix == "cls":
                labels[key] = file.read().decode().strip()
            else:
                images[key] = member.name, file.read()
    for key, (name, content) in images.items():
        path = folder / f"class-{labels[key]}" / Path(name).name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def link_shards(source: Path, folder: Path, count: int) -> None:
    """Makes a folder of the first ``count`` training shards of another, and of no test shards."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in sorted(source.glob("train-*.tar"))[:count]:
        (folder / shard.name).symlink_to(shard.resolve())


def write_small_images(folder: Path) -> None:
    """Writes synthetic images of CIFAR's size into class folders, as JPEGs: that is what its shards hold."""
    write_images(folder)
    for path in folder.glob("*/*.png"):
        with Image.open(path) as image:
            image.save(path.with_suffix(".jpg"), quality=_QUALITY)
        path.unlink()


def copy_photographs(source: Path, folder: Path) -> None:
    """Copies JPEGs from all over a folder, which may hold more or fewer than ``NUM_PHOTOGRAPHS``.

    Raises:
        FileNotFoundError: it holds none.
    """
    files = sorted(file for file in source.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg"))
    if not files:
        raise FileNotFoundError(f"no JPEG below {source}")
    for number in range(NUM_PHOTOGRAPHS):
        chosen = files[number * max(1, len(files) // NUM_PHOTOGRAPHS) % len(files)]
        _photograph(folder, number).write_bytes(chosen.read_bytes())


def write_photographs(folder: Path) -> None:
    """Writes JPEGs as large as ImageNet's median one, of noise with a spectrum like a photograph's."""
    rng = np.random.default_rng(0)
    height, width = _SIZE
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    for number in range(NUM_PHOTOGRAPHS):
        noise = np.fft.rfft2(rng.standard_normal((4, height, width)))
        grey, *tints = np.fft.irfft2(noise / frequency**_SLOPE, s=_SIZE)
        colours = np.stack([grey + 0.3 * tint for tint in tints], axis=-1)
        pixels = (128 + 50 * colours / colours.std()).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(_photograph(folder, number), quality=_QUALITY, subsampling=0)


def _photograph(folder: Path, number: int) -> Path:
    """Where a photograph goes: names that do not depend on its source are split the same way everywhere."""
    path = folder / f"class-{number % NUM_CLASSES}" / f"{number:04d}.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path
