"""A small training problem for engines: a model with every kind of parameter, and its batches."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlomae.distributed.engine import Engine
from mlomae.mlo.schedule import warmup_cosine
from mlomae.sections import LevelConfig

STEPS = 8
HALF = STEPS // 2


class Model(nn.Module):
    """One of each: a matrix, a bias, scale and shift, a token, a table, a frozen parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.randn(1, 1, 4), requires_grad=False)
        self.out = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.linear(x) + self.cls_token[0] + self.pos_embed[0])
        return self.out(F.gelu(hidden))


def fresh_model() -> Model:
    torch.manual_seed(3)
    return Model()


def batches(first: int = 0, count: int = STEPS) -> Iterator[tuple[Tensor, Tensor]]:
    for number in range(first, first + count):
        generator = torch.Generator().manual_seed(number)
        yield (
            torch.randn(6, 4, generator=generator) * 5,
            torch.randint(0, 3, (6,), generator=generator),
        )


def rate(step: int, config: LevelConfig) -> float:
    return warmup_cosine(step, STEPS, config.lr, config.min_lr, config.warmup)


def run_engine(engine: Engine, config: LevelConfig, first: int = 0, count: int = STEPS) -> list[float]:
    losses = []
    for step, (x, y) in enumerate(batches(first, count), start=first):
        # The factor lifts the gradient's norm above 1.
        loss = 4 * F.cross_entropy(engine(x), y)
        engine.descend(loss, rate(step, config))
        losses.append(float(loss.detach()))
    return losses
