"""Precision of a run: bf16 autocast, TF32 or plain float32; weights are float32 in any case."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mlomae.errors import UserError

BF16_AUTOCAST = {"enabled": True, "dtype": "bfloat16"}
"""DeepSpeed's section ``torch_autocast`` that says the same as ``compute.precision: bf16``."""


def resolve_precision(
    wanted: str, device: torch.device, ds_config: dict[str, Any] | None, field: str = "compute.precision"
) -> str:
    """bf16, tf32 or float32: what a recipe's precision means on a device beside a DeepSpeed configuration.

    Args:
        field: of the recipe, for messages.

    Raises:
        UserError: the recipe and the DeepSpeed configuration contradict each other, or TF32 on a CPU.
    """
    section = (ds_config or {}).get("torch_autocast")
    if section is not None:
        autocast = bool(section.get("enabled"))
        if wanted == "auto":
            return "bf16" if autocast else "float32"
        if autocast != (wanted == "bf16"):
            raise UserError(
                f"{field}: {wanted}, but the DeepSpeed configuration has torch_autocast.enabled "
                f"{str(autocast).lower()}; remove one of them"
            )
    if wanted == "tf32" and device.type == "cpu":
        raise UserError(f"{field}: tf32 needs a GPU; use float32 or bf16 on a CPU")
    if wanted == "auto":
        return "bf16" if device.type == "cuda" else "float32"
    return wanted


def with_precision(ds_config: dict[str, Any], precision: str) -> dict[str, Any]:
    """A DeepSpeed configuration that runs its passes in ``precision``."""
    if precision != "bf16" or "torch_autocast" in ds_config:
        return ds_config
    return {**ds_config, "torch_autocast": BF16_AUTOCAST}


def describe_precision(precision: str, device: torch.device) -> str:
    """The precision in words; says so where a CPU has no arithmetic for it."""
    if precision != "bf16":
        return precision
    if device.type == "cpu" and not cpu_has_bf16():
        return "bf16 autocast (slow: this processor converts to float32 and back)"
    return "bf16 autocast"


def cpu_has_bf16() -> bool:
    """Whether an x86 processor multiplies bf16 numbers itself (AVX512_BF16 or AMX)."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def set_float32_products(precision: str) -> None:
    """How a GPU rounds float32 products from here on, TF32 or not at all."""
    # The older switch of the same: torch.export refuses to start where the two differ.
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    for switch in _switches():
        switch.fp32_precision = "tf32" if precision == "tf32" else "ieee"


@contextmanager
def ieee_float32() -> Iterator[None]:
    """Float32 products without TF32, whose rounding would drown a finite difference."""
    switches = _switches()
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value


def _switches() -> list[Any]:
    # cuDNN's convolutions, and with them the patch projection, use TF32 unless told otherwise.
    # torch.backends.cudnn replaces itself by an object that has more attributes than the module.
    return [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]
