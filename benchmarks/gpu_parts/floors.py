"""What a pretraining step must at least do: operations and bytes, counted and not timed.

Operations: those of matrix products, attention and convolutions, forward and backward, nothing recomputed,
counted by ``FlopCounterMode`` on the meta device with the attention written out. Bytes of a step:

* AdamW reads weights, gradients and two moments and writes all but the gradients: 7 numbers in float32;
* weights and gradients under bf16 autocast: float32 weights read, bf16 ones written and read in both passes,
  bf16 gradients written, read and written as float32: 18 bytes per weight;
* activations, an estimate: 16 numbers per token and channel of each block, in bf16, written once and read
  once; fused kernels need fewer, eager ones more;
* images, float32: read by the patch projection, by its gradient and by the loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.gpu_parts.files import markdown
from benchmarks.gpu_parts.models import MODELS, Model, build_autoencoder

ADAMW_BYTES, AUTOCAST_BYTES = 7 * 4, 18
NUMBERS_PER_TOKEN = 16
# Data sheets, for arithmetic without a GPU; FLOP/s come from mlomae.peaks.
CHIPS = {"H100": ("NVIDIA H100 80GB HBM3", 3.35e12), "H200": ("NVIDIA H200", 4.8e12)}


@dataclass(frozen=True)
class Floor:
    """The least work of one step.

    Attributes:
        weights: trainable ones.
        flops: operations.
        adamw, autocast, activations, images: bytes.
    """

    model: Model
    weights: int
    flops: int
    adamw: int
    autocast: int
    activations: int
    images: int

    @property
    def other_bytes(self) -> int:
        """Of the forward and backward passes."""
        return self.autocast + self.activations + self.images

    def milliseconds(self, flops: float, bandwidth: float) -> dict[str, float]:
        """At a rate of operations and one of bytes per second.

        The passes can move their bytes while they compute; the optimizer has nothing to compute.
        """
        compute, passes = 1e3 * self.flops / flops, 1e3 * self.other_bytes / bandwidth
        adamw = 1e3 * self.adamw / bandwidth
        return {
            "FLOP floor, ms": compute,
            "byte floor of the passes, ms": passes,
            "byte floor of AdamW, ms": adamw,
            "floor, ms": max(compute, passes) + adamw,
        }


def floor(model: Model) -> Floor:
    """Counts one step; takes about a second on a CPU."""
    meta = torch.device("meta")
    module = build_autoencoder(model, meta, attention="reference")
    weights = sum(weight.numel() for weight in module.parameters() if weight.requires_grad)
    encoder = model.depth * model.width * (1 + model.num_keep)
    decoder = model.decoder_depth * model.decoder_dim * (1 + model.num_patches)
    return Floor(
        model=model,
        weights=weights,
        flops=_count(module, model, meta),
        adamw=ADAMW_BYTES * weights,
        autocast=AUTOCAST_BYTES * weights,
        activations=model.batch * (encoder + decoder) * NUMBERS_PER_TOKEN * 2 * 2,
        images=model.batch * 3 * model.img_size**2 * 4 * 3,
    )


def _count(module: torch.nn.Module, model: Model, meta: torch.device) -> int:
    from mlomae.models.selection import PatchSelection

    batch, patches = model.batch, model.num_patches
    images = torch.empty(batch, 3, model.img_size, model.img_size, device=meta)
    selection = PatchSelection(
        torch.empty(batch, model.num_keep, dtype=torch.int64, device=meta),
        torch.empty(batch, patches, dtype=torch.int64, device=meta),
        torch.empty(batch, patches, device=meta),
    )
    with FlopCounterMode(display=False) as counter:
        module(images, selection).sum().backward()
    return counter.get_total_flops()


def work_row(work: Floor) -> dict[str, str | int | float]:
    """A row of what has to be done."""
    model = work.model
    return {
        "model": model.title,
        "batch": model.batch,
        "weights, M": work.weights / 1e6,
        "GFLOP/image": work.flops / model.batch / 1e9,
        "TFLOP/step": work.flops / 1e12,
        "AdamW, GB": work.adamw / 1e9,
        "weights and gradients, GB": work.autocast / 1e9,
        "activations (estimate), GB": work.activations / 1e9,
        "images, GB": work.images / 1e9,
    }


def show() -> None:
    """Prints the floors of all models; no GPU is needed and nothing is timed."""
    from mlomae.peaks import data_sheet_peak

    works = [floor(model) for model in MODELS.values()]
    print(f"Least work of a plain pretraining step\n\n{markdown([work_row(work) for work in works])}")
    for chip, (name, bandwidth) in CHIPS.items():
        peak = data_sheet_peak(name, "bf16")
        assert peak is not None
        rows = []
        for work in works:
            least = work.milliseconds(peak, bandwidth)
            images = 1e3 * work.model.batch / least["floor, ms"]
            rows.append({"model": work.model.title, **least, "images/s at the floor": images})
        rates = f"{peak / 1e12:,.0f} TFLOP/s in bf16, {bandwidth / 1e12:.2f} TB/s"
        print(f"\nAt the data sheet of an {chip} ({rates}): arithmetic, not measured\n\n{markdown(rows)}")
    print(f"\n{_outer_iteration()}")


def _outer_iteration() -> str:
    """FLOPs of an outer iteration over those of its plain steps."""
    from mlomae.config import load_config
    from mlomae.flops import iteration_flops

    rows = []
    for every in (1, 4):
        sizes = {f"{level}.batch_size": "128" for level in ("pretrain", "head", "mask")}
        config = load_config(None, {"model.arch": "vit_base", "hypergradient.every": str(every), **sizes})
        parts = iteration_flops(config, num_classes=10, estimator="jvp")
        rows.append(
            {
                "hypergradient every": every,
                **{f"{name}, TFLOP": flops / 1e12 for name, flops in parts.items()},
                "over its plain steps": sum(parts.values()) / parts["pretrain"],
            }
        )
    return f"An outer iteration of ViT-B/16, batch 128, two pretraining steps\n\n{markdown(rows)}"
