"""How images get into shards: as they are, smaller, or in another format."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.data.made_shards import by_source, create, pixels


def test_files_are_copied_byte_for_byte(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    source = tmp_path / "images"
    kept = {"b/a.jpg": "JPEG", "b/b.JPEG": "JPEG", "a/c.PNG": "PNG", "a/d.webp": "WEBP", "a/e.jpg": "PNG"}
    made = {"a/f.bmp": "BMP", "b/g.tiff": "TIFF", "b/h.ppm": "PPM"}
    files = {
        name: encode(seed, 9, 6, format=form) for seed, (name, form) in enumerate({**kept, **made}.items())
    }
    for name, content in files.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes(content)
    create(source, tmp_path / "out")
    samples = by_source(tmp_path / "out")
    assert samples.keys() == files.keys()
    for name in kept:
        suffix, content, _ = samples[name]
        assert (suffix, content) == (name.rpartition(".")[2].lower(), files[name])
    for name in made:
        suffix, content, _ = samples[name]
        assert suffix == "png" and np.array_equal(pixels(content), pixels(files[name]))
    about = {"label": 1, "name": "b", "source": "b/a.jpg", "width": 6, "height": 9}
    assert samples["b/a.jpg"][2] == about
    assert json.loads((tmp_path / "out" / "classes.json").read_text()) == ["a", "b"]


def test_images_are_shrunk_with_averaging(tmp_path: Path, encode: Callable[..., bytes]) -> None:
    source = tmp_path / "images"
    source.mkdir()
    board = np.indices((96, 64)).sum(0) % 2 * 255
    Image.fromarray(board.astype(np.uint8)).save(source / "board.png")
    photograph = Image.fromarray(np.full((300, 400, 3), (200, 100, 50), np.uint8))
    photograph.save(source / "large.jpg", quality=95)
    files = {"small.png": encode(1, 16, 99), "exact.jpg": encode(2, 99, 16, format="JPEG")}
    for name, content in files.items():
        (source / name).write_bytes(content)
    create(source, tmp_path / "out", resize=16)
    samples = by_source(tmp_path / "out")
    assert {name: samples[name][1] for name in files} == files
    shrunk = pixels(samples["board.png"][1])
    assert shrunk.shape == (24, 16) and abs(shrunk.astype(float) - 127.5).max() < 2
    suffix, content, about = samples["large.jpg"]
    assert suffix == "jpg" and (about["width"], about["height"]) == (21, 16)
    assert pixels(content).shape == (16, 21, 3)
    assert abs(pixels(content).astype(float) - (200, 100, 50)).max() < 5


@pytest.mark.parametrize("format", ["jpg", "png", "webp"])
def test_one_format_for_all(tmp_path: Path, encode: Callable[..., bytes], format: str) -> None:
    source = tmp_path / "images"
    source.mkdir()
    files = {
        form.lower(): encode(seed, 40, 40, format=form) for seed, form in enumerate(("JPEG", "PNG", "WEBP"))
    }
    for name, content in files.items():
        (source / f"{name}.{name}").write_bytes(content)
    sizes = []
    for quality in (30, 95):
        create(source, tmp_path / f"out{quality}", format=format, quality=quality)
        samples = by_source(tmp_path / f"out{quality}")
        sizes.append(sum(len(content) for _, content, _ in samples.values()))
        for name, content in files.items():
            suffix, stored, _ = samples[f"{name}.{name}"]
            assert suffix == format
            assert Image.open(io.BytesIO(stored)).format == {"jpg": "JPEG"}.get(format, format.upper())
            if name.replace("jpeg", "jpg") == format:
                assert stored == content
            elif format == "png":
                assert np.array_equal(pixels(stored), pixels(content))
    assert (sizes[0] < sizes[1]) == (format != "png")


def test_real_photographs(tmp_path: Path, shared_data: Path) -> None:
    created = create(shared_data / "imagenet_sample", tmp_path / "out", per_shard=100, workers=2, check=False)
    assert len(created.parts["train"].samples) == 240 and created.faults == ()
    samples = by_source(tmp_path / "out")
    for path in (shared_data / "imagenet_sample").rglob("*.JPEG"):
        suffix, content, about = samples[path.relative_to(shared_data / "imagenet_sample").as_posix()]
        assert (suffix, content) == ("jpeg", path.read_bytes())
        assert Image.open(io.BytesIO(content)).size == (about["width"], about["height"])
