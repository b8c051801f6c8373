"""What a pretrain step spends outside matrix products, by kind of operation, and what torch.compile saves.

Answers one question: would a hand-written kernel for bias + GELU or residual + LayerNorm pay? It would have
to beat the compiled block, which already fuses both.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.report import Report, Row
from mlomae.config import ModelConfig
from mlomae.models.mae import MaskedAutoencoder
from mlomae.models.selection import PatchSelection
from mlomae_kernels import select_patches

WARM_UP, ROUNDS = 2, 9
MODEL = ModelConfig(arch="vit_small", decoder_dim=256, decoder_depth=2, decoder_heads=8)
BATCH = 8
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


def _step(module: nn.Module, images: Tensor, selection: PatchSelection) -> None:
    module.zero_grad()
    module(images, selection).mean().backward()


def _shares(module: nn.Module, images: Tensor, selection: PatchSelection) -> dict[str, float]:
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        _step(module, images, selection)
    seconds: defaultdict[str, float] = defaultdict(float)
    for event in profiler.key_averages():
        kinds = [kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)]
        seconds[kinds[0] if kinds else "rest"] += event.self_cpu_time_total
    total = sum(seconds.values())
    return {kind: seconds[kind] / total for kind in [*KINDS, "rest"]}


def test_profile(report: Report) -> None:
    images, selection = _batch()
    module = MaskedAutoencoder(MODEL)
    for _ in range(WARM_UP):
        _step(module, images, selection)
    shares = _shares(module, images, selection)
    report.table(
        f"share of an eager pretrain step, {MODEL.arch}/{MODEL.patch_size}, batch {BATCH}, float32, CPU",
        [{"kind": kind, "share": share} for kind, share in shares.items()],
    )

    compiled = MaskedAutoencoder(MODEL)
    for blocks in (compiled.encoder.blocks, compiled.decoder.blocks):
        for block in blocks:
            block.compile(fullgraph=True)
    steps = {"eager": module, "compiled blocks": compiled}
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(WARM_UP + ROUNDS):
        for name, model in steps.items():
            started = time.perf_counter()
            _step(model, images, selection)
            if number >= WARM_UP:
                times[name].append(time.perf_counter() - started)
    ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
    rows: list[Row] = [
        {"blocks": name, "ms": 1e3 * statistics.median(seconds)} for name, seconds in times.items()
    ]
    report.table(f"pretrain step, medians of {ROUNDS} alternating rounds", rows)
    report.table("what compiling the blocks gains", [{"eager / compiled": ratio}])
