"""Images per second of a plain pretraining step: ours beside others, same model and batch, bf16 autocast."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.gpu_parts.clock import Clock, forget_peak, peak_gib
from benchmarks.gpu_parts.job import Job
from benchmarks.gpu_parts.models import Model, PretrainStep, model_for

TIMES_TIMM = 2.0
OURS = "ours, compiled"
TIMM = "timm's blocks, eager"
TRANSFORMERS = "transformers' ViTMAE, eager"
ROUNDS, STEPS, WARM_UP = 5, 6, 3


@dataclass
class Contender:
    """A program's step, its seconds per step in each round, and its peak memory in GiB."""

    name: str
    step: Callable[[], object]
    seconds: list[float] = field(default_factory=list)
    peak: float | None = None


def run(job: Job) -> Iterator[None]:
    """Ours is compiled first; then all take turns."""
    model = model_for("b16", job.device, job.smoke)
    contenders: list[Contender] = []
    images = torch.randn(model.batch, 3, model.img_size, model.img_size, device=job.device)
    ours = PretrainStep(model, job.device, job.smoke)
    ours.use("compiled")
    ours.optimise(fused=True)
    contenders.append(_warm(job, Contender(OURS, ours.once)))
    for name, build in ((TIMM, _timm), (TRANSFORMERS, _transformers)):
        with job.attempt(name):
            loss = build(model, job.device)
            contenders.append(_warm(job, Contender(name, _step(loss, images))))
    yield
    rounds, steps = (1, 1) if job.smoke else (ROUNDS, STEPS)
    for number in range(rounds):
        if number and job.left() < 8:
            job.note(f"{number} of {rounds} rounds for lack of time")
            break
        for contender in list(contenders):
            with job.attempt(contender.name):
                _take_turn(job, contender, steps)
            if len(contender.seconds) <= number:
                contenders.remove(contender)
    _report(job, model, contenders)


def _report(job: Job, model: Model, contenders: list[Contender]) -> None:
    ours = next((contender for contender in contenders if contender.name == OURS), None)
    ratios: dict[str, float | None] = {}
    for contender in contenders:
        ratios[contender.name] = None if ours is None else statistics.median(
            theirs / own for theirs, own in zip(contender.seconds, ours.seconds, strict=True)
        )  # fmt: skip
    rows = [
        {
            "program": contender.name,
            "step, ms": 1e3 * statistics.median(contender.seconds),
            "images/s": model.batch / statistics.median(contender.seconds),
            "ours, compiled, is faster by": ratios[contender.name],
            "peak, GiB": contender.peak,
        }
        for contender in contenders
    ]
    job.table("peers", f"{model.title}, batch {model.batch}, a plain pretraining step in bf16", rows)
    what = f"{model.title}: images/s, ours compiled / timm's blocks eager"
    job.bar(what, ratios.get(TIMM), ">=", TIMES_TIMM)


def _warm(job: Job, contender: Contender) -> Contender:
    for _ in range(1 if job.smoke else WARM_UP):
        contender.step()
    return contender


def _take_turn(job: Job, contender: Contender, steps: int) -> None:
    clock = Clock(job.device)
    contender.step()
    clock.wait()
    forget_peak(job.device)
    started = time.perf_counter()
    for _ in range(steps):
        contender.step()
    clock.wait()
    contender.seconds.append((time.perf_counter() - started) / steps)
    contender.peak = peak_gib(job.device)


def _step(module: nn.Module, images: Tensor) -> Callable[[], object]:
    """A step of a module that maps images to a loss."""
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1.5e-4, betas=(0.9, 0.95), weight_decay=0.05, foreach=True)

    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16):
            loss = module(images)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _timm(model: Model, device: torch.device) -> nn.Module:
    from benchmarks.gpu_parts.timm_peer import TimmAutoencoder

    with torch.device(device):
        return TimmAutoencoder(model)


class _Loss(nn.Module):
    """A module of transformers as a map from images to a loss."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Tensor:
        loss: Tensor = self.module(pixel_values=images).loss
        return loss


def _transformers(model: Model, device: torch.device) -> nn.Module:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        hidden_size=model.width,
        num_hidden_layers=model.depth,
        num_attention_heads=model.heads,
        intermediate_size=4 * model.width,
        decoder_hidden_size=model.decoder_dim,
        decoder_num_hidden_layers=model.decoder_depth,
        decoder_num_attention_heads=model.decoder_heads,
        decoder_intermediate_size=4 * model.decoder_dim,
        image_size=model.img_size,
        patch_size=model.patch_size,
        mask_ratio=0.75,
        norm_pix_loss=True,
        layer_norm_eps=1e-6,
    )
    return _Loss(ViTMAEForPreTraining(config).train().to(device))
