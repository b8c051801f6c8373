"""Plain MAE steps as a user's program takes them: the loop that peers without a multilevel part share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.peers.measure import Peer
from benchmarks.peers.problem import ReadAhead
from mlomae.config import Config
from mlomae.data.loader import LevelLoaders


def plain_peer(
    config: Config,
    iterations: int,
    build: Callable[[], nn.Module],
    loss: Callable[[nn.Module, Tensor], Tensor],
) -> Peer:
    """One outer iteration is as many plain steps as the other peers take on their lowest level.

    Args:
        build: the model, with seeded weights; torch's default AdamW optimises it.
        loss: of (model, images [B, C, H, W]), 0-dim.
    """
    steps, rates = config.pretrain.unroll_steps, config.pretrain
    stream = ReadAhead(LevelLoaders(config).pretrain, steps * iterations)
    torch.manual_seed(config.seed)
    model = build().train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=rates.lr, betas=rates.betas, weight_decay=rates.weight_decay
    )

    def iterate(number: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            loss(model, stream.next().images).backward()
            optimizer.step()

    return Peer(iterate)
