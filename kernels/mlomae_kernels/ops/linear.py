"""Affine maps: ``x Wᵀ + b``, on an AMD processor with oneDNN's float32 products instead of MKL's.

MKL, which torch uses for float32 on x86, takes its AVX-512 kernels on Intel's processors only. oneDNN, which
torch ships for convolutions and bfloat16, takes them everywhere: 213 against 185 GFLOP/s on two Zen 4 cores.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from mlomae_kernels._registry import is_transformed

# Fewer numbers in a result are not worth a Python function of autograd's.
_SMALLEST_RESULT = 2**14


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear``, differentiable any number of times and in forward mode.

    Args:
        x: [..., K].
        weight: [N, K].
        bias: [N], or None.

    Returns:
        [..., N].
    """
    if torch.compiler.is_compiling() or not _suits(x, weight):
        return F.linear(x, weight, bias)
    result: Tensor = _Linear.apply(x, weight, bias)
    return result


def _suits(x: Tensor, weight: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() // x.shape[-1] * len(weight) >= _SMALLEST_RESULT
        and not torch.is_autocast_enabled("cpu")
        and one_dnn_pays()
        and not (is_transformed(x) or is_transformed(weight))
    )


@functools.cache
def one_dnn_pays() -> bool:
    """Whether MKL would leave this processor's AVX-512 unused."""
    if not torch.backends.mkldnn.is_available() or not torch.cpu._is_avx512_supported():
        return False
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x weightᵀ + bias`` by oneDNN, without a graph."""
    result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (grad,), (x, weight) = grads, ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        rows, columns = grad.flatten(0, -2), x.flatten(0, -2)
        d_x = d_weight = None
        if torch.is_grad_enabled():  # a graph of this backward pass is wanted: products that have one
            d_x = grad @ weight if need_x else None
            d_weight = rows.t() @ columns if need_weight else None
        else:
            if need_x:
                d_x = _product(grad, weight.t(), None)
            if need_weight:
                # oneDNN transposes its first factor at a price that only narrow layers earn back.
                narrow = weight.shape[0] < weight.shape[1]
                d_weight = _product(rows.t(), columns.t(), None) if narrow else rows.t() @ columns
        return d_x, d_weight, rows.sum(0) if need_bias else None
