"""Small data sets on disk, and a configuration for them."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlomae.config import Config
from mlomae.data import urls

MakeConfig = Callable[..., Config]


@pytest.fixture
def make_config() -> MakeConfig:
    """Builds a Config from keyword sections, with small batches and an 8x8 grey model by default."""

    def make(**sections: Any) -> Config:
        tree: dict[str, Any] = {
            "model": {"img_size": 8, "patch_size": 2, "in_chans": 1},
            **{level: {"batch_size": 8} for level in ("pretrain", "head", "mask")},
            "eval": {"batch_size": 16},
        }
        for name, value in sections.items():
            tree[name] = {**tree.get(name, {}), **value} if isinstance(value, dict) else value
        return Config.model_validate(tree)

    return make


@pytest.fixture
def encode() -> Callable[..., bytes]:
    """Encodes noise from a seed: (height, width, mode) → bytes of an image file."""

    def encode_image(
        seed: int, height: int = 8, width: int = 8, mode: str = "RGB", format: str = "PNG"
    ) -> bytes:
        shape = (height, width) if mode == "L" else (height, width, len(mode))
        pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, format)
        return content.getvalue()

    return encode_image


@pytest.fixture
def fill_folder(encode: Callable[..., bytes]) -> Callable[..., None]:
    """Writes ``count`` images 0.png, 1.png, … of different contents into a folder."""

    def fill(folder: Path, count: int, first_seed: int = 0, **options: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            (folder / f"{number}.png").write_bytes(encode(first_seed + number, **options))

    return fill


@pytest.fixture
def write_tar() -> Callable[[Path, Mapping[str, bytes]], None]:
    def write(path: Path, members: Mapping[str, bytes]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(path, "w") as tar:
            for name, content in members.items():
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    return write


@pytest.fixture
def fill_shard(encode: Callable[..., bytes], write_tar: Callable[..., None]) -> Callable[..., None]:
    """Writes a shard of ``count`` images with labels 0, 1, 0, 1, …"""

    def fill(path: Path, count: int, first_seed: int = 0) -> None:
        members = {}
        for number in range(count):
            members[f"s{number:03d}.png"] = encode(first_seed + number)
            members[f"s{number:03d}.cls"] = str(number % 2).encode()
        write_tar(path, members)

    return fill


@pytest.fixture
def quick_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets readers try three times in no time."""
    monkeypatch.setattr(urls, "DELAYS", (0.001, 0.001))


@pytest.fixture
def shared_data() -> Path:
    """The folder of real images beside the checkout; a test that needs it is skipped without it."""
    folder = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("no folder shared/data with real images beside the checkout")
    return folder.resolve()
