"""Tensors and JSON out of files that others wrote. No code of theirs is run: there is no plain unpickling."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mlomae.errors import UserError
from mlomae.run_dir import first_few

PICKLED = (".pth", ".pt", ".bin")
# Of a folder, the first that is there is read.
FOLDER_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# Under which trainers store the state dict.
_WRAPPERS = ("model", "state_dict")
# What wrappers of a module put before its names.
_PREFIXES = ("module.", "encoder.")


def read_folder(folder: Path) -> tuple[dict[str, Tensor], Path]:
    """The tensors of a folder's weights, in one file or several, and the file that was read.

    Raises:
        UserError: there are none, or they cannot be read.
    """
    path = next((folder / name for name in FOLDER_FILES if (folder / name).is_file()), None)
    if path is None:
        raise UserError(f"{folder}: holds no weights; expected {FOLDER_FILES[0]} or {FOLDER_FILES[2]}")
    if path.suffix != ".json":
        return read_tensors(path)[0], path
    shards = read_json(path).get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
        raise UserError(f"{path}: has no weight_map from tensors to files")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(shards.values())):
        if Path(name).name != name:
            raise UserError(f"{path}: names the file {name!r}, which is not in this folder")
        tensors |= _read_raw(folder / name)[0]
    missing = sorted(shards.keys() - tensors.keys())
    if missing:
        raise UserError(f"{path}: its files lack {first_few(missing)}")
    return _without_prefixes(tensors), path


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state dict in a file, and what else lies beside it there.

    A state dict may lie under ``model`` or ``state_dict``; prefixes that all names share are taken off.

    Raises:
        UserError: the file is absent, damaged, of another kind, or holds more than plain data.
    """
    tensors, beside = _read_raw(path)
    return _without_prefixes(tensors), beside


def _read_raw(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """``read_tensors`` with names as they are."""
    if path.suffix == ".safetensors":
        return _read_safetensors(path), {}
    if path.suffix not in PICKLED:
        raise UserError(f"{path}: unknown kind of file; expected .safetensors, {', '.join(PICKLED)}")
    content: Any = _read_pickled(path)
    beside: dict[str, Any] = {}
    wrapper = next((key for key in _WRAPPERS if isinstance(content, dict) and key in content), None)
    if wrapper is not None:
        beside = {key: value for key, value in content.items() if key != wrapper}
        content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise UserError(f"{path}: holds no state dict; found {type(content).__name__}")
    others = [str(name) for name, value in content.items() if not isinstance(value, Tensor)]
    if others:
        raise UserError(f"{path}: holds no state dict; found values that are no tensors: {first_few(others)}")
    return {str(name): value for name, value in content.items()}, beside


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it is absent, or no JSON object.
    """
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError:
        raise UserError(f"{path}: is no valid JSON") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: found {type(content).__name__}, expected an object of fields")
    return content


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None
    except SafetensorError as error:
        raise UserError(f"{path}: is damaged or no safetensors file ({error})") from None


def _read_pickled(path: Path) -> object:
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below, where other errors are meant
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        # Trainers store their command line as a Namespace, which holds attributes and does nothing.
        with file, torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # torch and its unpickler raise nearly every type on damaged bytes
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused is None:
            raise UserError(f"{path}: is damaged, or no file that torch.save wrote for tensors") from None
        raise UserError(
            f"{path}: refused, it holds more than tensors ({refused[1]}) and loading that could run code; "
            "save the state dict alone, best as safetensors"
        ) from None


def _without_prefixes(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    prefix = next((p for p in _PREFIXES if tensors and all(name.startswith(p) for name in tensors)), None)
    if prefix is None:
        return tensors
    return _without_prefixes({name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
