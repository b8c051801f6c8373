"""Chooses the implementation of an operator; the choice changes speed, never a result."""

from __future__ import annotations

import torch
from torch import Tensor

from mlomae_kernels import reference
from mlomae_kernels._native import native_select_patches


def select_patches(scores: Tensor, num_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    if _is_plain_cpu_float32(scores):
        native = native_select_patches()
        if native is not None:
            reference.check_selection(scores, num_keep)
            # Detached: an operator without a derivative must not appear in an autograd graph.
            return native(scores.detach(), num_keep)
    return reference.select_patches(scores, num_keep)


select_patches.__doc__ = reference.select_patches.__doc__


def _is_plain_cpu_float32(tensor: Tensor) -> bool:
    """Whether native code may read the tensor's memory: no compilation, subclass or transform in between."""
    return (
        not torch.compiler.is_compiling()
        and type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.dtype == torch.float32
        # The public way to ask whether a torch.func transform wraps the tensor.
        and torch.func.debug_unwrap(tensor, recurse=False) is tensor
    )
