"""Self-attention on packed queries, keys and values: softmax(q kᵀ / √d) v, without mask or dropout.

=========== ================================================================================
back end    what it is
=========== ================================================================================
flash       the flash-attn package: version 4, 3 or 2, whichever is installed and knows the GPU;
            bfloat16 and float16 only, float32 takes ``fused``
fused       torch's ``scaled_dot_product_attention``
reference   the formula in plain PyTorch: the only one with second derivatives and forward mode
auto        flash where it can be had, else fused
=========== ================================================================================

Inside ``torch.func`` transforms and for tensors with forward-mode tangents every choice takes
``reference``, because the others have no such derivatives; a double backward through them raises.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from mlomae_kernels import checks
from mlomae_kernels._registry import is_transformed

BACKENDS = ("auto", "flash", "fused", "reference")
_HALF = (torch.bfloat16, torch.float16)
_MAX_HEAD_DIM = 256

Attention = Callable[[Tensor], Tensor]


class AttentionChoice(NamedTuple):
    """The back end that is used, why in words, and its function [B, N, 3, H, d] → [B, N, H, d]."""

    name: str
    reason: str
    run: Attention


class _FlashRelease(NamedTuple):
    """One generation of flash-attn: where it lives and on which GPUs it has a backward pass."""

    name: str
    module: str
    function: str
    packed: bool
    majors: tuple[int, ...]


# In order of preference on a GPU that several of them know (compute capability major).
_RELEASES = (
    _FlashRelease("flash-attn 3", "flash_attn_interface", "flash_attn_qkvpacked_func", True, (9,)),
    _FlashRelease("flash-attn 4", "flash_attn.cute", "flash_attn_func", False, (9, 10, 11, 12)),
    _FlashRelease("flash-attn 2", "flash_attn", "flash_attn_qkvpacked_func", True, (8, 9, 10, 12)),
)


def attention(qkv: Tensor, backend: str = "auto") -> Tensor:
    """Self-attention of every head.

    Args:
        qkv: floating [B, N, 3, H, d]: queries, keys and values of N tokens and H heads, as one linear
            layer of width 3 * H * d leaves them; nothing is transposed in memory.
        backend: auto | flash | fused | reference, see the module.

    Returns:
        [B, N, H, d] in the dtype of ``qkv``.

    Raises:
        ValueError: on a wrong shape, dtype or name, or flash where it cannot be had.
    """
    checks.check_attention(qkv)
    if not torch.compiler.is_compiling() and is_transformed(qkv):
        return _reference(qkv)
    return _RUNNING[_choose(backend, qkv.device, qkv.dtype, qkv.shape[4])](qkv)


def choose_attention(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> AttentionChoice:
    """What ``attention`` uses for tensors like these.

    Raises:
        ValueError: on an unknown name, or flash where it cannot be had.
    """
    if backend not in BACKENDS:
        raise checks.error("attention", "backend", repr(backend), f"one of {', '.join(BACKENDS)}")
    if backend == "reference":
        return AttentionChoice("reference", "as configured", _reference)
    if backend == "fused":
        return AttentionChoice("fused", "as configured", _fused)
    flash = _find_flash(device)
    if isinstance(flash, str) and backend == "flash":
        raise checks.error("attention", "backend", "flash", f"another one: {flash}")
    if isinstance(flash, str):
        return AttentionChoice("fused", flash, _fused)
    if dtype not in _HALF:
        return AttentionChoice("fused", f"flash-attn has no {dtype}", _fused)
    if head_dim > _MAX_HEAD_DIM or head_dim % 8:
        unfit = f"flash-attn takes heads of 8, 16, … {_MAX_HEAD_DIM}, not {head_dim}"
        return AttentionChoice("fused", unfit, _fused)
    return flash


def _find_flash(device: torch.device) -> AttentionChoice | str:
    """The best installed flash-attn for a device, or the reason why there is none."""
    if device.type != "cuda":
        return f"flash-attn does not run on {device.type}"
    return _find_release(torch.cuda.get_device_capability(device)[0])


@functools.cache
def _find_release(major: int) -> AttentionChoice | str:
    reasons = []
    for release in _RELEASES:
        if major not in release.majors:
            continue
        try:
            function = getattr(importlib.import_module(release.module), release.function)
        except (ImportError, AttributeError) as error:
            reasons.append(f"{release.name}: {error}")
            continue
        return AttentionChoice(release.name, f"{release.module} is installed", _flash(function, release))
    return "; ".join(reasons) or f"no flash-attn for compute capability {major}"


def _flash(function: Callable[..., Tensor | tuple[Tensor, ...]], release: _FlashRelease) -> Attention:
    def run(qkv: Tensor) -> Tensor:
        # Its fastest backward pass adds up in the order in which blocks of the GPU come to it.
        options = {"deterministic": True} if torch.are_deterministic_algorithms_enabled() else {}
        output = function(qkv, **options) if release.packed else function(*qkv.unbind(2), **options)
        # Some releases return the log-sum-exp beside the output.
        return output if isinstance(output, Tensor) else output[0]

    return run


def _fused(qkv: Tensor) -> Tensor:
    query, key, value = qkv.transpose(1, 3).unbind(2)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def _reference(qkv: Tensor) -> Tensor:
    query, key, value = qkv.unbind(2)
    logits = torch.einsum("bnhd,bmhd->bhnm", query * qkv.shape[4] ** -0.5, key)
    wide = torch.promote_types(logits.dtype, torch.float32)
    shares = logits.softmax(dim=3, dtype=wide).to(value.dtype)
    return torch.einsum("bhnm,bmhd->bnhd", shares, value).to(qkv.dtype)


# The functions in use by name; flash-attn's join when they are chosen.
_RUNNING: dict[str, Attention] = {"fused": _fused, "reference": _reference}


def _choose(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Name of the function that ``choose_attention`` gives."""
    choice = choose_attention(backend, device, dtype, head_dim)
    _RUNNING[choice.name] = choice.run
    return choice.name


# The compiler must not trace the search for packages: its result is a constant of device, dtype and head.
# This is what torch.compiler.assume_constant_result sets, without importing the compiler.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]
