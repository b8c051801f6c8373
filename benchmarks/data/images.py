"""Pictures of CIFAR's size as an image folder and as shards: CIFAR's own, or synthetic ones."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path


def pack(folder: Path, shard: Path) -> None:
    """Writes the images of class folders ``*-NUMBER`` into one WebDataset shard, classes mixed."""
    files = sorted(folder.glob("*/*"), key=lambda file: file.name)
    shard.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(shard, "w") as tar:
        for file in files:
            label = file.parent.name.rpartition("-")[2]
            for name, content in ((f"{file.stem}.cls", label.encode()), (file.name, file.read_bytes())):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


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
