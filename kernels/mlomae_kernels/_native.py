"""Finds and loads the native operators at their first use, and says why when it cannot.

``MLOMAE_KERNELS=reference`` keeps everything in plain PyTorch; the default, ``auto``, uses native code
where it was built. The variable is read once.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, cast

import torch
from torch import Tensor

_LIBRARY = Path(__file__).with_name("_C.so")

SelectPatches = Callable[[Tensor, int], tuple[Tensor, Tensor, Tensor]]


class NativeStatus(NamedTuple):
    """Whether native operators are in use, and the reason in words."""

    available: bool
    reason: str


@functools.cache
def native_status() -> NativeStatus:
    """Loads the native library if it is there and wanted.

    Raises:
        ValueError: when MLOMAE_KERNELS is neither auto nor reference.
    """
    choice = os.environ.get("MLOMAE_KERNELS", "auto")
    if choice not in ("auto", "reference"):
        raise ValueError(f"MLOMAE_KERNELS: got {choice!r}, expected 'auto' or 'reference'")
    if choice == "reference":
        return NativeStatus(False, "switched off by MLOMAE_KERNELS=reference")
    if not _LIBRARY.exists():
        return NativeStatus(False, f"{_LIBRARY.name} was not built when the package was installed")
    try:
        torch.ops.load_library(str(_LIBRARY))
    except OSError as error:
        return NativeStatus(False, f"{_LIBRARY.name} cannot be loaded: {error}")
    return NativeStatus(True, f"loaded {_LIBRARY.name}")


def native_select_patches() -> SelectPatches | None:
    """The native operator (CPU, float32, no gradient), or None where there is none."""
    if not native_status().available:
        return None
    return cast(SelectPatches, torch.ops.mlomae_native.select_patches)
