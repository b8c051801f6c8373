"""The optimizer step of a ViT-S: the trainer's AdamW against torch's."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.comparison import Compare
from benchmarks.report import Report
from benchmarks.timing import Function
from mlomae.distributed.engine import build_adamw
from mlomae.models.encoder import ViTEncoder
from mlomae.sections import LevelConfig

BASELINES: dict[str, dict[str, Any]] = {
    "default AdamW": {},
    "foreach AdamW": {"foreach": True},
}


def _steps_like(ours: torch.optim.AdamW, **settings: Any) -> Function:
    """Steps of a plain AdamW with the same groups, rates and gradients on weights of its own."""
    groups = []
    for group in ours.param_groups:
        weights = [parameter.detach().clone() for parameter in group["params"]]
        for weight, parameter in zip(weights, group["params"], strict=True):
            weight.grad = parameter.grad.clone()
        groups.append({"params": weights, "weight_decay": group["weight_decay"]})
    rates = {name: ours.defaults[name] for name in ("lr", "betas", "eps")}
    return torch.optim.AdamW(groups, **rates, **settings).step


def test_adamw(compare: Compare, report: Report) -> None:
    encoder = ViTEncoder("vit_small", (224, 224), 16, 3)
    ours = build_adamw(encoder, LevelConfig())
    parameters = [parameter for group in ours.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = 1e-3 * torch.randn_like(parameter)
    baselines = {name: _steps_like(ours, **settings) for name, settings in BASELINES.items()}
    compared = compare("step/adamw", ours.step, baselines, rounds=30)
    count = sum(parameter.numel() for parameter in parameters)
    report.table(
        f"optimizer step of {count / 1e6:.1f} million weights in {len(parameters)} tensors, CPU, medians",
        [
            {"optimizer": name, "ms": 1e3 * seconds, "x ours": compared.ratios.get(name)}
            for name, seconds in compared.medians.items()
        ],
    )
