"""Finds and loads the native operators at their first use, and says why when it cannot."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

_FOLDER = Path(__file__).parent
CUDA_OPERATORS = ("patch_gather", "patch_gather_backward", "patch_scatter", "patch_scatter_backward")
"""What the CUDA library implements; Triton has all of them."""


class NativeStatus(NamedTuple):
    """Whether a native library is loaded, and the reason in words."""

    available: bool
    reason: str


@functools.cache
def native_status(device_type: str = "cpu") -> NativeStatus:
    """Loads the native library for ``cpu`` or ``cuda`` if it was built."""
    if device_type != "cpu":
        # The schemas of the operators are in the CPU library.
        cpu = native_status("cpu")
        return _load(_FOLDER / "_C_cuda.so") if cpu.available else cpu
    return _load(_FOLDER / "_C.so")


def native_operator(name: str) -> Callable[..., Any]:
    """The native twin of an operator, after ``native_status`` said that there is one."""
    return getattr(torch.ops.mlomae_native, name).default


def _load(library: Path) -> NativeStatus:
    if not library.exists():
        return NativeStatus(False, f"{library.name} was not built when the package was installed")
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        return NativeStatus(False, f"{library.name} cannot be loaded: {error}")
    return NativeStatus(True, f"loaded {library.name}")
