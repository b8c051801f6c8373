"""Files of a checkpoint: hashed while they are written, in chunks; tensors are read one by one.

Tensors are stored in the safetensors format. It is written here and not by the package, because the package
gives no checksum: the file would have to be read again. Hashing and writing release Python's global lock,
so that training goes on in other threads.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

_CHUNK = 16 * 2**20  # bytes
_ALIGNMENT = 8  # bytes
# The format's names.
_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> dict[str, Any]:
    """Writes a new file and forces it to the disk.

    Args:
        parts: its content in order; none is held longer than it is written.

    Returns:
        ``{"size": bytes, "sha256": hex digits}``.
    """
    digest, size = hashlib.sha256(), 0
    with open(path, "xb") as file:
        for part in parts:
            for start in range(0, len(part), _CHUNK):
                chunk = part[start : start + _CHUNK]
                digest.update(chunk)
                file.write(chunk)
                size += len(chunk)
        file.flush()
        os.fsync(file.fileno())
    return {"size": size, "sha256": digest.hexdigest()}


def sha256(path: Path) -> str:
    """Hex digits of the checksum of a whole file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def safetensors_parts(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> Iterator[bytes | memoryview]:
    """The content of a safetensors file, for ``write_file``.

    Args:
        tensors: any device and layout; those on another device or not contiguous are copied, one at a time.
        metadata: texts for the header.

    Raises:
        KeyError: a dtype that the format is not used for here (float, bfloat16, int, bool are).
    """
    # Widest first, as the format's own writer does: every tensor is then aligned to its element size.
    names = sorted(tensors, key=lambda name: -tensors[name].element_size())
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for name in names:
        yield _bytes_of(tensors[name])


class StoredTensors(Mapping[str, Tensor]):
    """Tensors in safetensors files, each read from its file when it is asked for.

    A tensor that is read is the caller's: changing it does not change the file.

    Args:
        places: by name, the open file and the tensor's name in it.
    """

    def __init__(self, places: Mapping[str, tuple[Any, str]]) -> None:
        self._places = dict(places)

    @classmethod
    def open(cls, files: Mapping[Path, str]) -> StoredTensors:
        """All tensors of some files.

        Args:
            files: what goes before the names of a file's tensors.

        Raises:
            OSError: a file cannot be opened.
            safetensors.SafetensorError: it has no valid header.
        """
        places = {}
        for path, prefix in files.items():
            file: Any = safe_open(path, framework="pt")
            places.update({prefix + name: (file, name) for name in file.keys()})  # noqa: SIM118 - no mapping
        return cls(places)

    def __getitem__(self, name: str) -> Tensor:
        file, stored = self._places[name]
        tensor: Tensor = file.get_tensor(stored)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, from the headers alone."""
        return {
            name: tuple(file.get_slice(stored).get_shape()) for name, (file, stored) in self._places.items()
        }

    def under(self, prefix: str) -> StoredTensors:
        """Those whose names begin with ``prefix``, by the rest of their names."""
        return StoredTensors(
            {
                name.removeprefix(prefix): place
                for name, place in self._places.items()
                if name.startswith(prefix)
            }
        )


def _bytes_of(tensor: Tensor) -> memoryview:
    # NumPy, which has no bfloat16, lends the bytes to Python without a copy.
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data
