"""A pretrain step on its own: what it spends outside matrix products, and what compiling and bf16 change.

The shares answer one question: would a hand-written kernel for bias + GELU or residual + LayerNorm pay? It
would have to beat the compiled step, which already fuses both.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.comparison import OURS, Compare, Compared
from benchmarks.report import Report
from benchmarks.timing import Function
from mlomae.compilation import compile_module
from mlomae.models.mae import MaskedAutoencoder
from mlomae.models.selection import PatchSelection
from mlomae.precision import cpu_has_bf16
from mlomae.sections import ModelConfig
from mlomae_kernels import select_patches

ROUNDS, WARM_UP = 9, 2
MODEL = ModelConfig(arch="vit_small", decoder_dim=256, decoder_depth=2, decoder_heads=8)
BATCH = 8
WHAT = f"pretrain step, {MODEL.arch}/{MODEL.patch_size}, batch {BATCH}, CPU"
# The first kind whose part occurs in an operation's name.
KINDS = {
    "matrix products": ("addmm", "aten::mm", "bmm", "convolution", "mkldnn", "linear"),
    "attention": ("scaled_dot_product", "flash_attention"),
    "GELU": ("gelu",),
    "LayerNorm": ("layer_norm",),
    "residual and other sums": ("aten::add", "aten::sum"),
    "patch operators": ("mlomae",),
}


def _batch() -> tuple[Tensor, PatchSelection]:
    images = torch.randn(BATCH, 3, *MODEL.size)
    scores = torch.rand(BATCH, MODEL.num_patches)
    return images, PatchSelection(*select_patches(scores, MODEL.num_patches // 4))


def _step(module: nn.Module, bf16: bool = False) -> Function:
    """Forward and backward, always on the same batch."""
    images, selection = _batch()

    def step() -> None:
        module.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            errors = module(images, selection)
        errors.mean().backward()

    return step


def _shares(step: Function) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    seconds: defaultdict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        kinds = [kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)]
        seconds[kinds[0] if kinds else "rest"] += event.self_cpu_time_total
    total = sum(seconds.values())
    return {kind: seconds[kind] / total for kind in [*KINDS, "rest"]}


def test_profile(report: Report) -> None:
    step = _step(MaskedAutoencoder(MODEL))
    for _ in range(WARM_UP):
        step()
    rows = [{"kind": kind, "share": share} for kind, share in _shares(step).items()]
    report.table(f"share of an eager {WHAT}, float32", rows)


def _show(report: Report, compared: Compared, ours: str) -> None:
    report.table(
        f"{WHAT}, medians",
        [
            {"step": ours if name == OURS else name, "ms": 1e3 * seconds, "gain": compared.ratios.get(name)}
            for name, seconds in compared.medians.items()
        ],
    )


def test_compiled(compare: Compare, report: Report) -> None:
    torch.compiler.reset()
    compiled = MaskedAutoencoder(MODEL)
    compile_module(compiled, "compiled")
    baselines = {"eager": _step(MaskedAutoencoder(MODEL))}
    compared = compare("step/compiled", _step(compiled), baselines, rounds=ROUNDS, warm_up=WARM_UP)
    _show(report, compared, "compiled")


@pytest.mark.skipif(not cpu_has_bf16(), reason="this processor has no bf16 arithmetic")
def test_bf16(compare: Compare, report: Report) -> None:
    baselines = {"float32": _step(MaskedAutoencoder(MODEL))}
    ours = _step(MaskedAutoencoder(MODEL), bf16=True)
    compared = compare("step/bf16-autocast", ours, baselines, rounds=ROUNDS, warm_up=WARM_UP)
    _show(report, compared, "bf16 autocast")
