"""AdamW whose rates fall from block to block towards the input."""

from __future__ import annotations

import re

import torch
from torch import nn

from mlomae.distributed.engine import NOT_DECAYED
from mlomae.downstream.sections import OptimConfig


def build_optimizer(model: nn.Module, encoder_prefix: str, config: OptimConfig) -> torch.optim.AdamW:
    """Groups of parameters by layer, each with its factor ``lr_scale``; matrices are decayed.

    Args:
        model: its trainable parameters are optimised.
        encoder_prefix: of the names of the timm ViT's parameters in the model, such as ``encoder.``.
    """
    prefix = re.escape(encoder_prefix)
    blocks = {
        m[1] for name, _ in model.named_parameters() if (m := re.match(rf"{prefix}blocks\.(\d+)\.", name))
    }
    depth = len(blocks)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            exempt = parameter.ndim < 2 or name.rsplit(".", 1)[-1] in NOT_DECAYED
            groups.setdefault((layer_of(name, encoder_prefix, depth), exempt), []).append(parameter)
    return torch.optim.AdamW(
        [
            {
                "params": parameters,
                "weight_decay": 0.0 if exempt else config.weight_decay,
                "lr_scale": config.layer_decay ** (depth + 1 - layer),
            }
            for (layer, exempt), parameters in sorted(groups.items())
        ],
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        fused=True,
    )


def layer_of(name: str, encoder_prefix: str, depth: int) -> int:
    """0 for the patch and position embedding, 1 to depth for the blocks, depth + 1 for all that follows."""
    if not name.startswith(encoder_prefix):
        return depth + 1
    part, *rest = name.removeprefix(encoder_prefix).split(".")
    if part in ("cls_token", "pos_embed", "patch_embed"):
        return 0
    return int(rest[0]) + 1 if part == "blocks" else depth + 1


def set_rates(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group, each by its factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
