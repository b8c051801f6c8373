"""Back ends of attention at the shapes of the models, forward and backward.

FLOP/s count what the formula needs: 4 B H N² d forward and twice that backward; what a back end computes
again does not count. Queries, keys and values lie packed, as one linear layer leaves them, and so do their
gradients; ``apart`` shows what packing costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import mlomae_kernels
from benchmarks.gpu_parts.clock import milliseconds
from benchmarks.gpu_parts.job import Job
from mlomae_kernels.ops.attention import choose_attention

_EACH = 1.0


@dataclass(frozen=True)
class Shape:
    """Where, and the sizes of an attention."""

    place: str
    batch: int
    tokens: int
    heads: int
    head_dim: int


SHAPES = (
    Shape("ViT-L/16 encoder, kept", 256, 50, 16, 64),
    Shape("MAE decoder, 14x14", 256, 197, 16, 32),
    Shape("ViT-B/16 encoder, kept", 256, 50, 12, 64),
    Shape("ViT-B/16 encoder, whole", 256, 197, 12, 64),
    Shape("ViT-H/14 encoder, kept", 128, 65, 16, 80),
    Shape("MAE decoder, 16x16", 128, 257, 16, 32),
)
SMOKE = (Shape("smoke", 2, 10, 2, 16),)
KERNELS = {
    "torch's choice": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}
Run = Callable[[], object]


def run(job: Job) -> Iterator[None]:
    """Needs no preparation."""
    yield
    rows: list[dict[str, str | float | None]] = []
    for shape in SMOKE if job.smoke else SHAPES:
        qkv = torch.randn(
            shape.batch, shape.tokens, 3, shape.heads, shape.head_dim,
            device=job.device, dtype=torch.bfloat16, requires_grad=True,
        )  # fmt: skip
        for name, kernel in KERNELS.items():
            if job.smoke and kernel is not None:
                continue
            context = nullcontext() if kernel is None else sdpa_kernel([kernel])
            _add(job, rows, shape, f"SDPA, {name}", qkv, "fused", context)
        _add_apart(job, rows, shape, qkv)
        try:
            flash = choose_attention("flash", job.device, torch.bfloat16, shape.head_dim)
        except ValueError as error:
            reason = str(error)
        else:
            reason = ""
            _add(job, rows, shape, flash.name, qkv, "flash", nullcontext())
        job.table("attention", "attention in bf16, forward and backward", rows)
    if reason:
        job.note(f"flash-attn: left out, {reason}")


def _add(
    job: Job,
    rows: list[dict[str, str | float | None]],
    shape: Shape,
    name: str,
    qkv: Tensor,
    backend: str,
    context: AbstractContextManager[object],
) -> None:
    """Measures a back end on packed inputs; one that does not take the shape gets an empty row."""
    job.require(_EACH, f"{name}, {shape.place}")
    cotangent = torch.randn_like(qkv[:, :, 0])
    try:
        with context:
            forward = milliseconds(lambda: mlomae_kernels.attention(qkv, backend), job.device)
            result = mlomae_kernels.attention(qkv, backend)
            backward = milliseconds(
                lambda: torch.autograd.grad(result, qkv, cotangent, retain_graph=True), job.device
            )
    except RuntimeError as error:
        job.note(f"{name}, {shape.place}: {' '.join(str(error).split())[:160]}")
        return
    rows.append(_row(shape, name, forward, backward))


def _add_apart(job: Job, rows: list[dict[str, str | float | None]], shape: Shape, qkv: Tensor) -> None:
    """torch's choice on queries, keys and values that lie apart."""
    apart = [part.detach().contiguous().requires_grad_() for part in qkv.transpose(1, 3).unbind(2)]
    cotangent = torch.randn_like(apart[0])
    with job.attempt(f"SDPA, apart, {shape.place}"):
        forward = milliseconds(lambda: scaled_dot_product_attention(*apart), job.device)
        result = scaled_dot_product_attention(*apart)
        backward = milliseconds(
            lambda: torch.autograd.grad(result, apart, cotangent, retain_graph=True), job.device
        )
        rows.append(_row(shape, "SDPA, torch's choice, apart", forward, backward))


def _row(shape: Shape, name: str, forward: float, backward: float) -> dict[str, str | float | None]:
    flops = 4 * shape.batch * shape.heads * shape.tokens**2 * shape.head_dim
    return {
        "shape": f"{shape.place}: B={shape.batch} N={shape.tokens} H={shape.heads} d={shape.head_dim}",
        "back end": name,
        "forward, ms": forward,
        "backward, ms": backward,
        "forward, TFLOP/s": flops / forward / 1e9,
        "both, TFLOP/s": 3 * flops / (forward + backward) / 1e9,
    }
