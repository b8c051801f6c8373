"""What the device reaches at best: large products, copies, and products of the models' own shapes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn import functional as F

from benchmarks.gpu_parts.clock import copy_bandwidth, milliseconds
from benchmarks.gpu_parts.job import Job
from benchmarks.gpu_parts.models import MODELS, SMOKE_MODEL, Model
from mlomae.peaks import data_sheet_peak, measured_peak

PRECISIONS = ("bf16", "tf32", "float32")


def run(job: Job) -> Iterator[None]:
    """Needs no preparation."""
    yield
    rows = []
    name = torch.cuda.get_device_name() if job.on_gpu else "cpu"
    for precision in PRECISIONS:
        with job.attempt(f"peak in {precision}"):
            measured = measured_peak(job.device, precision)
            sheet = data_sheet_peak(name, precision)
            rows.append(
                {
                    "precision": precision,
                    "measured, TFLOP/s": None if measured is None else measured / 1e12,
                    "data sheet, TFLOP/s": None if sheet is None else sheet / 1e12,
                    "share": measured / sheet if measured and sheet else None,
                }
            )
    job.table("peaks", f"{name}: large square products", rows)
    with job.attempt("copy"):
        bandwidth = copy_bandwidth(job.device)
        job.table("copy", "a large copy, read and write", [{"GB/s": bandwidth / 1e9}])
    with job.attempt("products of the models"):
        for model in [SMOKE_MODEL] if job.smoke else MODELS.values():
            job.require(2, f"products of {model.title}")
            products = [_product(job, *shape) for shape in _shapes(model)]
            title = f"{model.title}, batch {model.batch}: its linear layers, bf16, forward"
            job.table(f"products-{model.key}", title, products)


def _shapes(model: Model) -> list[tuple[str, int, int, int]]:
    """(layer, rows, in, out) of the linear layers."""
    width, inner = model.width, model.decoder_dim
    visible, everything = model.batch * (1 + model.num_keep), model.batch * (1 + model.num_patches)
    return [
        ("encoder, qkv", visible, width, 3 * width),
        ("encoder, projection", visible, width, width),
        ("encoder, MLP in", visible, width, 4 * width),
        ("encoder, MLP out", visible, 4 * width, width),
        ("decoder, qkv", everything, inner, 3 * inner),
        ("decoder, projection", everything, inner, inner),
        ("decoder, MLP in", everything, inner, 4 * inner),
        ("decoder, MLP out", everything, 4 * inner, inner),
    ]


def _product(job: Job, layer: str, rows: int, inner: int, outer: int) -> dict[str, str | int | float]:
    x = torch.randn(rows, inner, device=job.device, dtype=torch.bfloat16)
    weight = torch.randn(outer, inner, device=job.device, dtype=torch.bfloat16)
    bias = torch.randn(outer, device=job.device, dtype=torch.bfloat16)
    time = milliseconds(lambda: F.linear(x, weight, bias), job.device, repeat=30)
    rate = 2 * rows * inner * outer / (1e-3 * time)
    return {
        "layer": layer, "rows": rows, "in": inner, "out": outer, "ms": time, "TFLOP/s": rate / 1e12,
    }  # fmt: skip
