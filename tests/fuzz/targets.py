"""What is fed with broken input. A target takes bytes; it reads them, or refuses them in one clear line."""

from __future__ import annotations

import atexit
import shutil
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import save

from mlomae import checkpoint
from mlomae.arguments import HelpShown
from mlomae.cli import COMMANDS, main
from mlomae.config import load_config
from mlomae.data.decoding import decode_image, image_size
from mlomae.data.faults import BadSample
from mlomae.data.shards.index import read_index, write_index
from mlomae.data.shards.scan import scan_shard
from mlomae.data.shards.source import ShardSource
from mlomae.errors import UserError
from mlomae.interop.files import read_tensors
from mlomae.recipes import recipes
from mlomae.study.plan import load_study
from mlomae.study.results import load_results
from mlomae.train_command import parse
from tests.data.archives import member, write
from tests.study.made import results

_INDEX = "train-index.json"
_SOME = 8  # samples of a shard, tensors of a file
Bases = Callable[[Path], list[bytes]]


@dataclass(frozen=True)
class Target:
    """A reader of input.

    Attributes:
        read: is given the input, and a folder in which nothing else lies.
        bases: valid inputs, which are then broken; made in an empty folder.
    """

    read: Callable[[bytes, Path], object]
    bases: Bases


def refused(read: Callable[[], object]) -> None:
    """Reads; all that may go wrong is one line."""
    try:
        read()
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error), str(error)


def _config(content: bytes, folder: Path) -> None:
    path = folder / "recipe.yaml"
    path.write_bytes(content)
    refused(lambda: load_config(path, {}))


def _study(content: bytes, folder: Path) -> None:
    path = folder / "study.yaml"
    path.write_bytes(content)
    refused(lambda: load_study(path))


def _results(content: bytes, folder: Path) -> None:
    path = folder / "results.json"
    path.write_bytes(content)
    refused(lambda: load_results(path))


def _command_line(content: bytes, folder: Path) -> None:
    """Words with a zero byte between them; what the operating system hands over may be any other bytes."""
    words = content.decode("utf-8", "surrogateescape").split("\0")
    with suppress(HelpShown):
        refused(lambda: parse(words))
    if words[0] not in COMMANDS and not words[0].startswith("-"):
        assert main(words) == 2


def _image(content: bytes, folder: Path) -> None:
    for in_chans in (1, 3):
        try:
            height, width = image_size(content)
            pixels = decode_image(content, in_chans)
        except BadSample as bad:
            assert bad.kind and "\n" not in bad.reason
        else:
            assert pixels.shape == (in_chans, height, width) and pixels.dtype == torch.uint8


def _shard(content: bytes, folder: Path) -> None:
    path = folder / "train-000000.tar"
    path.write_bytes(content)

    def read() -> None:
        index = scan_shard(str(path))
        source = ShardSource(index)
        try:
            for number in range(min(_SOME, len(source))):
                try:
                    decode_image(source.content(number), 3)
                except BadSample as bad:
                    assert bad.kind
        finally:
            source.close()

    refused(read)


def _index(content: bytes, folder: Path) -> None:
    """The table of samples, or its description: the first byte tells which one is broken."""
    broken, content = content[:1], content[1:]
    shutil.copytree(_good(_write_index), folder, dirs_exist_ok=True)
    path = folder / _INDEX
    (path if broken == b"0" else path.with_suffix(".npz")).write_bytes(content)
    refused(lambda: read_index(str(path)))


def _checkpoint(content: bytes, folder: Path) -> None:
    """One of a checkpoint's files, which the first byte tells, beside good ones."""
    names = ("encoder.safetensors", "training.safetensors", "state.json", "manifest.json")
    broken, content = names[(content[:1] or b"0")[0] % len(names)], content[1:]
    shutil.copytree(_good(_save_checkpoint), folder, dirs_exist_ok=True)
    (folder / "checkpoints" / "step-00000002" / broken).write_bytes(content)

    def read(path: Path) -> None:
        loaded = checkpoint.read(path)
        for name in list(loaded.tensors)[:_SOME]:
            loaded.tensors[name].sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = checkpoint.newest(folder / "checkpoints")
    # The one before is always there.
    assert found is not None
    refused(lambda: read(found))
    refused(lambda: read(folder / "checkpoints" / "step-00000002"))


def _weights(suffix: str) -> Callable[[bytes, Path], None]:
    def read(content: bytes, folder: Path) -> None:
        path = folder / f"weights{suffix}"
        path.write_bytes(content)
        refused(lambda: read_tensors(path))

    return read


@cache
def _good(make: Callable[[Path], object]) -> Path:
    """A folder with good files, to be copied: to make them anew waits for the disk."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    make(folder)
    return folder


def _save_checkpoint(folder: Path) -> None:
    tensors = {"pretrain.weight.encoder.w": torch.ones(3, 2), "head.weight.w": torch.zeros(4)}
    for step in (1, 2):
        checkpoint.save(folder / "checkpoints", step, tensors, {"iteration": step}, 2, None)


def _write_shard(path: Path, first: int = 0) -> Path:
    """Two samples."""
    numbers = range(first, first + 2)
    members = [(f"{n}.png", _png()) for n in numbers] + [(f"{n}.cls", b"%d" % n) for n in numbers]
    write(path, [member(name, content) for name, content in sorted(members)])
    return path


def _png(format: str = "PNG", mode: str = "RGB") -> bytes:
    file = BytesIO()
    Image.linear_gradient("L").resize((16, 12)).convert(mode).save(file, format)
    return file.getvalue()


def _write_index(folder: Path) -> Path:
    path = folder / _INDEX
    write_index(path, scan_shard(str(_write_shard(folder / "train-000000.tar"))))
    return path


def _checkpoint_files(folder: Path) -> list[bytes]:
    _save_checkpoint(folder)
    step = folder / "checkpoints" / "step-00000002"
    names = ("encoder.safetensors", "training.safetensors", "state.json", "manifest.json")
    return [bytes([number]) + (step / name).read_bytes() for number, name in enumerate(names)]


def _index_files(folder: Path) -> list[bytes]:
    path = _write_index(folder)
    return [b"0" + path.read_bytes(), b"1" + path.with_suffix(".npz").read_bytes()]


def _pickled(content: Mapping[str, Any]) -> bytes:
    file = BytesIO()
    torch.save(content, file)
    return file.getvalue()


_STUDY = b"recipe: digits\nsteps: 8\narms: {a: {set: {seed: 1}}, b: {against: a, seeds: [1]}}\n"
_STATE = {"cls_token": torch.ones(1, 1, 8), "norm.weight": torch.ones(8)}
_WORDS = (
    "--config digits --pretrain.lr 1e-4 --run-dir runs/x", "--masking.policy=random --seed 3 --json",
    "--model.pool [cls] --data.path ~/x --help", "--deepspeed_config ds_configs/zero1.json",
)  # fmt: skip
TARGETS: dict[str, Target] = {
    "config": Target(_config, lambda _: [path.read_bytes() for path in recipes().values()]),
    "study": Target(_study, lambda _: [_STUDY]),
    "results": Target(_results, lambda _: [results({"random": [0.4], "learned": [0.5]}).dump().encode()]),
    "command line": Target(_command_line, lambda _: [words.replace(" ", "\0").encode() for words in _WORDS]),
    "image": Target(
        _image,
        lambda _: [
            *(_png(format) for format in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF")),
            _png("JPEG", "CMYK"), _png("PNG", "I;16"), _png("PNG", "P"),
        ],
    ),
    "shard": Target(_shard, lambda folder: [_write_shard(folder / "a.tar").read_bytes()]),
    "index": Target(_index, _index_files),
    "checkpoint": Target(_checkpoint, _checkpoint_files),
    "safetensors": Target(_weights(".safetensors"), lambda _: [save(_STATE)]),
    "pickle": Target(_weights(".pth"), lambda _: [_pickled({"model": _STATE, "epoch": 3}), _pickled(_STATE)]),
}  # fmt: skip
