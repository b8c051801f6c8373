"""Chooses the implementation of an operator; the choice changes speed, never a result.

``MLOMAE_KERNELS`` (read once):

=========== ================================================================================
auto        the default: Triton on CUDA and ROCm, native code on the CPU, plain PyTorch elsewhere and
            wherever the faster one is missing
reference   plain PyTorch
native      native code: C++ on the CPU; CUDA C++ for gather and scatter, Triton for the others
triton      Triton; on the CPU under its interpreter only (TRITON_INTERPRET=1), which is for tests
=========== ================================================================================

A choice that is not ``auto`` never falls back: it raises, with the reason. ``MLOMAE_KERNELS_DEBUG=1``
checks the values of indices on every device, at the price of waiting for a GPU; otherwise they are
checked on the CPU, and on a GPU an index out of range gives rows of NaN.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mlomae_kernels import _native

CHOICES = ("auto", "reference", "native", "triton")
Implementation = Callable[..., Any]

_forced: str | None = None


@functools.cache
def _environment_choice() -> str:
    choice = os.environ.get("MLOMAE_KERNELS", "auto")
    if choice not in CHOICES:
        raise ValueError(f"MLOMAE_KERNELS: got {choice!r}, expected one of {', '.join(CHOICES)}")
    return choice


@functools.cache
def debug() -> bool:
    """Whether the values of indices are checked where that waits for a GPU."""
    return os.environ.get("MLOMAE_KERNELS_DEBUG", "0") == "1"


@contextmanager
def implementation(choice: str) -> Iterator[None]:
    """Overrides ``MLOMAE_KERNELS`` in this process, for comparisons in tests and benchmarks."""
    global _forced
    if choice not in CHOICES:
        raise ValueError(f"implementation: got {choice!r}, expected one of {', '.join(CHOICES)}")
    before, _forced = _forced, choice
    try:
        yield
    finally:
        _forced = before


def describe(device_type: str) -> str:
    """The implementations in use on a device and why, in words: ``native (loaded _C.so)``."""
    name, reason = _resolve(_forced or _environment_choice(), device_type)
    return f"{name} ({reason})"


def fast_implementation(operator: str, device_type: str) -> Implementation | None:
    """The implementation to call instead of plain PyTorch, or None for plain PyTorch.

    Raises:
        RuntimeError: a choice other than auto that cannot be had here.
    """
    return _find(operator, device_type, _forced or _environment_choice())


@functools.cache
def _find(operator: str, device_type: str, choice: str) -> Implementation | None:
    name, reason = _resolve(choice, device_type)
    if choice not in ("auto", name):
        raise RuntimeError(f"{operator}: MLOMAE_KERNELS={choice} on {device_type}: {reason}")
    if choice == "auto" and name == "reference" and device_type in ("cpu", "cuda"):
        _warn_once(device_type, reason)
    if name == "native" and device_type == "cuda" and operator not in _native.CUDA_OPERATORS:
        name = "triton"
    if name == "native":
        return _native.native_operator(operator)
    if name == "triton":
        module = importlib.import_module(f"mlomae_kernels.triton_ops.{operator.removesuffix('_backward')}")
        found: Implementation = getattr(module, operator)
        return found
    return None


@functools.cache
def _resolve(choice: str, device_type: str) -> tuple[str, str]:
    """(implementation that is used, reason)."""
    if choice == "reference":
        return "reference", "switched off by MLOMAE_KERNELS=reference"
    if device_type not in ("cpu", "cuda"):
        return "reference", f"no other implementation for {device_type}"
    if choice == "auto":
        choice = "native" if device_type == "cpu" else "triton"
    if choice == "native":
        available, reason = _native.native_status(device_type)
    else:
        available, reason = _triton_status(device_type)
    return (choice if available else "reference"), reason


def _triton_status(device_type: str) -> tuple[bool, str]:
    if importlib.util.find_spec("triton") is None:
        return False, "triton is not installed"
    import triton

    if device_type == "cpu" and not triton.knobs.runtime.interpret:
        return False, "triton runs on the CPU under TRITON_INTERPRET=1 only"
    return True, f"triton {triton.__version__}"


@functools.cache
def _warn_once(device_type: str, reason: str) -> None:
    warnings.warn(
        f"mlomae_kernels: plain PyTorch on {device_type}, slower: {reason}", RuntimeWarning, stacklevel=2
    )
