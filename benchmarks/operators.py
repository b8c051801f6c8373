"""The operators as the benchmarks call them: real shapes, inputs made in advance, bytes that must move.

``reference`` is the same function in plain PyTorch, with autograd's own backward: what eager mode and
``torch.compile`` are measured on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mlomae_kernels
from mlomae_kernels import reference

Function = Callable[..., Any]
HEAD_DIM = 64


@dataclass(frozen=True)
class Shape:
    """A batch of images cut into patches, a quarter of them kept.

    Attributes:
        batch: images.
        patches: L, a square number.
        width: D of the tokens, a multiple of HEAD_DIM.
        patch_size: side of a patch of three channels, for the loss.
    """

    batch: int
    patches: int
    width: int
    patch_size: int

    @property
    def num_keep(self) -> int:
        return self.patches // 4

    def __str__(self) -> str:
        return f"B={self.batch} L={self.patches} D={self.width}"

    @property
    def slug(self) -> str:
        """For names of tests and files."""
        return f"b{self.batch}-l{self.patches}-d{self.width}-p{self.patch_size}"


@dataclass(frozen=True)
class Call:
    """One operator at one shape.

    Attributes:
        name: as in the table.
        operator, reference: the same function, fast and plain.
        inputs: its arguments.
        leaves: the arguments that receive a gradient; none for a selection.
        cotangent: like the result.
        forward_bytes, backward_bytes: least traffic: what must be read once and written once.
    """

    name: str
    operator: Function
    reference: Function
    inputs: tuple[Any, ...]
    leaves: tuple[Tensor, ...]
    cotangent: Tensor | None
    forward_bytes: int
    backward_bytes: int

    def backward(self, result: Tensor) -> Sequence[Tensor]:
        """Gradients of the leaves; the graph is kept for the next time."""
        return torch.autograd.grad(result, self.leaves, self.cotangent, retain_graph=True)

    def run(self, function: Function) -> Sequence[Tensor]:
        """Forward and, where there is one, backward."""
        result = function(*self.inputs)
        if not self.leaves:
            return result
        return [result, *torch.autograd.grad(result, self.leaves, self.cotangent)]


class Inputs:
    """Makes tensors of one dtype on one device."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        scores = torch.rand(shape.batch, shape.patches, device=device)
        self.scores = scores
        self.ids_keep, self.ids_restore, self.mask = mlomae_kernels.select_patches(scores, shape.num_keep)

    def random(self, *sizes: int, grad: bool = True) -> Tensor:
        return torch.randn(sizes, device=self.device, dtype=self.dtype, requires_grad=grad)


def calls(shape: Shape, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Call]:
    """Every operator at a shape, with fresh inputs."""
    inputs = Inputs(shape, dtype, device)
    return [
        select_call(inputs),
        gather_call(inputs, learned=False),
        gather_call(inputs, learned=True),
        scatter_call(inputs, learned=False),
        scatter_call(inputs, learned=True),
        loss_call(inputs, norm_pix=True),
        loss_call(inputs, norm_pix=False),
        attention_call(inputs),
    ]


def select_call(inputs: Inputs) -> Call:
    shape = inputs.shape
    moved = shape.batch * (4 * shape.patches + 8 * shape.num_keep + (8 + 4) * shape.patches)
    return Call(
        "select_patches",
        mlomae_kernels.select_patches,
        reference.select_patches,
        (inputs.scores, shape.num_keep),
        (),
        None,
        moved,
        0,
    )


def gather_call(inputs: Inputs, learned: bool) -> Call:
    """``learned``: whether the positions receive a gradient too."""
    shape = inputs.shape
    batch, patches, width, kept = shape.batch, shape.patches, shape.width, shape.num_keep
    tokens, token = inputs.random(batch, patches, width), inputs.random(1, 1, width)
    pos = inputs.random(1, patches, width, grad=learned)
    row = width * inputs.dtype.itemsize
    return Call(
        f"patch_gather{', learned positions' if learned else ''}",
        mlomae_kernels.patch_gather,
        reference.patch_gather,
        (tokens, pos, inputs.ids_keep, token),
        (tokens, pos, token) if learned else (tokens, token),
        inputs.random(batch, 1 + kept, width, grad=False),
        (batch * (kept + 1 + kept) + patches) * row,
        (batch * (1 + kept + patches) + (patches if learned else 0)) * row,
    )


def scatter_call(inputs: Inputs, learned: bool) -> Call:
    """``learned``: whether the positions receive a gradient too."""
    shape = inputs.shape
    batch, patches, width, kept = shape.batch, shape.patches, shape.width, shape.num_keep
    latent, token = inputs.random(batch, 1 + kept, width), inputs.random(1, 1, width)
    pos = inputs.random(1, 1 + patches, width, grad=learned)
    row = width * inputs.dtype.itemsize
    both = batch * (1 + kept + 1 + patches)
    return Call(
        f"patch_scatter{', learned positions' if learned else ''}",
        mlomae_kernels.patch_scatter,
        reference.patch_scatter,
        (latent, token, inputs.ids_restore, pos),
        (latent, token, pos) if learned else (latent, token),
        inputs.random(batch, 1 + patches, width, grad=False),
        (both + 1 + patches) * row,
        (both + (1 + patches if learned else 0)) * row,
    )


def loss_call(inputs: Inputs, norm_pix: bool) -> Call:
    """The loss over patches of ``patch_size``; images stay float32, as autocast leaves them."""
    shape, mask = inputs.shape, inputs.mask
    side, size = round(shape.patches**0.5), shape.patch_size
    numbers = 3 * size * size
    images = torch.randn(shape.batch, 3, side * size, side * size, device=inputs.device)
    pred = inputs.random(shape.batch, shape.patches, numbers)

    def operator(pred: Tensor, images: Tensor, mask: Tensor) -> Tensor:
        return mlomae_kernels.masked_patch_loss(pred, images, mask, patch_size=size, norm_pix=norm_pix)

    def plain(pred: Tensor, images: Tensor, mask: Tensor) -> Tensor:
        # A mask is float32 also where the others are converted to float64 for a comparison.
        return reference.masked_patch_loss(pred, images, mask.float(), None, size, norm_pix)

    read = shape.batch * (shape.patches - shape.num_keep) * numbers * (pred.element_size() + 4)
    return Call(
        f"masked_patch_loss, {size}x{size}{', norm_pix' if norm_pix else ''}",
        operator,
        plain,
        (pred, images, mask),
        (pred,),
        torch.rand(mask.shape, device=inputs.device),
        read + mask.numel() * 8,
        read + pred.numel() * pred.element_size() + mask.numel() * 8,
    )


def attention_call(inputs: Inputs) -> Call:
    shape = inputs.shape
    heads, tokens = shape.width // HEAD_DIM, 1 + shape.patches
    qkv = inputs.random(shape.batch, tokens, 3, heads, HEAD_DIM)
    cotangent = inputs.random(shape.batch, tokens, heads, HEAD_DIM, grad=False)
    packed, single = (t.numel() * t.element_size() for t in (qkv, cotangent))

    def plain(qkv: Tensor) -> Tensor:
        return mlomae_kernels.attention(qkv, "reference")

    return Call(
        "attention",
        mlomae_kernels.attention,
        plain,
        (qkv,),
        (qkv,),
        cotangent,
        packed + single,
        2 * packed + 2 * single,
    )
