"""What computes an operator, how far it is from plain PyTorch in float64, and how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

import mlomae_kernels
from benchmarks.gpu_parts.clock import milliseconds
from benchmarks.operators import Call, Function, Inputs, Shape, calls
from mlomae_kernels import reference
from mlomae_kernels._native import CUDA_OPERATORS, native_status

# The shape that the bars are about comes first.
SHAPES = {
    "ViT-L/16 encoder": Shape(256, 196, 1024, patch_size=16),
    "MAE decoder": Shape(256, 196, 512, patch_size=16),
    "ViT-B/2, CIFAR": Shape(256, 256, 768, patch_size=2),
    "ViT-H/14": Shape(128, 256, 1280, patch_size=14),
}
# No size divides by a vector, a warp or a block.
AWKWARD = {"awkward": Shape(5, 49, 100, patch_size=3)}
SMOKE = {"smoke": Shape(2, 9, 64, patch_size=2)}
DTYPES = (torch.bfloat16, torch.float32)


def all_calls(shape: Shape, dtype: torch.dtype, device: str) -> list[Call]:
    """Every operator at a shape, and the two that know the removed patches by position."""
    inputs = Inputs(shape, dtype, device)
    return [*calls(shape, dtype, device), _removed_rows_call(inputs), _removed_loss_call(inputs)]


def providers(call: Call, device_type: str, backend: str | None = None) -> dict[str, Function]:
    """Functions by name; triton and native are the operator within ``using(name)``.

    Args:
        backend: of ``torch.compile``; None leaves the compiler out.
    """
    found: dict[str, Function] = {"eager": call.reference}
    if backend is not None:
        found["compile"] = torch.compile(call.reference, fullgraph=True, dynamic=False, backend=backend)
    if call.name == "attention":
        return {**found, "fastest": call.operator}
    found["triton"] = call.operator
    operator = call.name.partition(",")[0]
    if has_native(device_type) and (device_type == "cpu" or operator in CUDA_OPERATORS):
        found["native"] = call.operator
    return found


def has_native(device_type: str) -> bool:
    return native_status(device_type).available


def using(provider: str) -> AbstractContextManager[None]:
    """A context in which an operator is computed by the provider."""
    return mlomae_kernels.implementation(provider) if provider in ("triton", "native") else nullcontext()


def expectation(call: Call) -> list[Tensor]:
    """The result, and the gradients of the leaves, by plain PyTorch in float64."""
    wide = [_double(value) for value in call.inputs]
    expected = call.reference(*wide)
    if not call.leaves:
        return list(expected)
    leaves = [wide[i] for i, value in enumerate(call.inputs) if any(value is leaf for leaf in call.leaves)]
    assert call.cotangent is not None
    return [expected.detach(), *torch.autograd.grad(expected, leaves, call.cotangent.double())]


def distance(call: Call, name: str, function: Function, expected: Sequence[Tensor]) -> float:
    """Largest error over what rounding explains, of the result and the gradients: 1 or less is right.

    NaN where a result holds one.
    """
    _poison(call)
    with using(name):
        results = call.run(function)
    ratios = []
    for got, want in zip(results, expected, strict=True):
        # One rounding of the result, and of the intermediate ones of the attention.
        tolerance = 4 * torch.finfo(got.dtype).eps if got.is_floating_point() else 0.0
        scale = want.abs().max().clamp(min=1.0)
        error = (got.detach().double() - want.double()).abs().max() / scale
        ratios.append(error / (tolerance + 1e-5))
    return float(torch.stack(ratios).max())


def times(call: Call, function: Function, device: torch.device) -> dict[str, float]:
    """Milliseconds of each direction."""
    found = {"forward": milliseconds(lambda: function(*call.inputs), device)}
    if call.leaves:
        result = function(*call.inputs)
        found["backward"] = milliseconds(lambda: call.backward(result), device)
    return found


def _poison(call: Call) -> None:
    """Leaves NaN in the memory that the results will get, so that what is not written shows."""
    likes = [*call.leaves, call.inputs[0] if call.cotangent is None else call.cotangent]
    if likes[0].is_cuda:
        spoilt = [torch.full_like(like, torch.nan, requires_grad=False) for like in likes]
        del spoilt


def _removed_rows_call(inputs: Inputs) -> Call:
    """The removed rows of the decoder, which its last layers compute alone."""
    shape = inputs.shape
    rows = inputs.random(shape.batch, shape.patches, shape.width)
    ids = _removed(inputs)
    row = shape.width * inputs.dtype.itemsize
    kept, all_rows = ids.numel() * row, shape.batch * shape.patches * row
    return Call(
        "patch_gather, removed rows",
        lambda rows, ids: mlomae_kernels.patch_gather(rows, None, ids, None),
        lambda rows, ids: reference.patch_gather(rows, None, ids, None),
        (rows, ids),
        (rows,),
        inputs.random(*ids.shape, shape.width, grad=False),
        2 * kept,
        kept + all_rows,
    )


def _removed_loss_call(inputs: Inputs) -> Call:
    """The loss of the removed patches, given by position."""
    shape, ids = inputs.shape, _removed(inputs)
    side, size = round(shape.patches**0.5), shape.patch_size
    numbers = 3 * size * size
    images = torch.randn(shape.batch, 3, side * size, side * size, device=inputs.device)
    pred = inputs.random(*ids.shape, numbers)

    def operator(pred: Tensor, images: Tensor, ids: Tensor) -> Tensor:
        return mlomae_kernels.masked_patch_loss(pred, images, ids, patch_size=size, norm_pix=True)

    def plain(pred: Tensor, images: Tensor, ids: Tensor) -> Tensor:
        return reference.masked_patch_loss(pred, images, ids, None, size, True)

    read = ids.numel() * numbers * (pred.element_size() + 4) + ids.numel() * 8
    return Call(
        f"masked_patch_loss, {size}x{size}, norm_pix, removed rows",
        operator,
        plain,
        (pred, images, ids),
        (pred,),
        torch.rand(ids.shape, device=inputs.device),
        read + ids.numel() * 4,
        read + ids.numel() * 4 + pred.numel() * pred.element_size(),
    )


def _removed(inputs: Inputs) -> Tensor:
    order = inputs.ids_restore.argsort(dim=1)
    return order[:, inputs.shape.num_keep :].contiguous()


def _double(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double().requires_grad_(value.requires_grad)
    return value
