"""Files of tensors: what is written is what the format's own reader finds, and its checksum is right."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from mlomae import checkpoint_file
from mlomae.checkpoint_file import StoredTensors, safetensors_parts, sha256, write_file

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
]  # fmt: skip


def write(path: Path, tensors: dict[str, Tensor]) -> None:
    entry = write_file(path, safetensors_parts(tensors))
    content = path.read_bytes()
    assert entry == {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    assert entry["sha256"] == sha256(path)


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().clone().reshape(-1).view(torch.uint8).tolist())


def assert_holds(path: Path, tensors: dict[str, Tensor]) -> None:
    found, stored = load_file(path), StoredTensors.open({path: ""})
    assert found.keys() == stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        for read in (found[name], stored[name]):
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape), name
            assert bits(read) == bits(tensor), name


@pytest.mark.parametrize("chunk", [7, 2**24])
def test_every_dtype_and_layout_reads_back_bit_for_bit(
    chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_file, "_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (5, 24), generator=generator, dtype=torch.uint8)
    tensors = {str(dtype): noise.view(dtype) for dtype in DTYPES if dtype is not torch.bool}
    tensors |= {f"{dtype}, one": torch.ones((), dtype=dtype) for dtype in DTYPES}
    tensors |= {f"{dtype}, none": torch.empty(0, 3, dtype=dtype) for dtype in DTYPES}
    flat = torch.randn(64, generator=generator)
    tensors |= {
        "bool": noise > 100,
        "special": torch.tensor([float("nan"), float("inf"), -0.0, 1e-45]),
        "transposed": flat.reshape(4, 16).t(),
        "strided": flat[::3],
        "part": flat[5:32],
        "overlapping": flat[16:48],
        "tied": flat,
        "expanded": torch.ones(1).expand(4),
        "parameter": torch.nn.Parameter(torch.ones(2)),
    }
    write(tmp_path / "x.safetensors", tensors)
    assert_holds(tmp_path / "x.safetensors", tensors)


def test_no_tensors(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors", {})
    assert load_file(tmp_path / "x.safetensors") == {}


def test_it_is_what_the_formats_own_writer_makes(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(7),
        "b": torch.ones(3, 5),
        "c": torch.tensor([True]),
        "d": torch.ones(2).half(),
    }
    write(tmp_path / "ours", tensors)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    with safe_open(tmp_path / "ours", "pt") as ours, safe_open(tmp_path / "theirs", "pt") as theirs:
        assert ours.metadata() == theirs.metadata() == {"format": "pt"}
        assert ours.offset_keys() == theirs.offset_keys()


def test_data_begins_and_lies_aligned(tmp_path: Path) -> None:
    for length in range(1, 10):
        tensors = {
            "n" * length: torch.ones(1, dtype=torch.int8),
            "f": torch.ones(3),
            "d": torch.ones(1).double(),
        }
        path = tmp_path / str(length)
        write(path, tensors)
        content = path.read_bytes()
        begin = 8 + int.from_bytes(content[:8], "little")
        assert begin % 8 == 0
        assert content[begin : begin + 8] == bits(torch.ones(1).double())  # widest first


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="complex64"):
        write_file(tmp_path / "x", safetensors_parts({"z": torch.zeros(2, dtype=torch.complex64)}))


def test_a_file_that_is_there_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError):
        write_file(path, [b"new"])
    assert path.read_bytes() == b"old"


def test_tensors_are_read_one_by_one_under_their_names(tmp_path: Path) -> None:
    write(tmp_path / "a", {"w": torch.ones(2), "v": torch.zeros(3)})
    write(tmp_path / "b", {"head.w": torch.full((1, 4), 2.0)})
    stored = StoredTensors.open({tmp_path / "a": "body.", tmp_path / "b": ""})
    assert stored.shapes() == {"body.w": (2,), "body.v": (3,), "head.w": (1, 4)}
    body = stored.under("body.")
    assert body.shapes() == {"w": (2,), "v": (3,)}
    assert body["w"].tolist() == [1, 1]
    assert len(stored) == 3
    with pytest.raises(KeyError):
        body["head.w"]
