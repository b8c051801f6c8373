"""Plain MAE steps as one writes them with timm's blocks and torch's AdamW: the third yardstick."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.gpu_parts.models import Model
from benchmarks.gpu_parts.timm_peer import TimmAutoencoder
from benchmarks.peers.measure import Peer, main
from benchmarks.peers.problem import ReadAhead
from mlomae.config import Config
from mlomae.data.loader import LevelLoaders
from mlomae.models.encoder import SIZES


def build(config: Config, folder: Path, iterations: int) -> Peer:
    """One outer iteration is as many plain steps as the other peers take on their lowest level."""
    steps, model = config.pretrain.unroll_steps, config.model
    width, depth, heads = SIZES[model.arch]
    stream = ReadAhead(LevelLoaders(config).pretrain, steps * iterations)
    torch.manual_seed(config.seed)
    autoencoder = TimmAutoencoder(
        Model(
            key="peer", title=model.arch, arch=model.arch, width=width, depth=depth, heads=heads,
            patch_size=model.patch_size, batch=config.pretrain.batch_size, compiled_mfu=None,
            img_size=model.size[0], decoder_dim=model.decoder_dim, decoder_depth=model.decoder_depth,
            decoder_heads=model.decoder_heads,
        )
    ).train()  # fmt: skip
    rates = config.pretrain
    optimizer = torch.optim.AdamW(
        autoencoder.parameters(), lr=rates.lr, betas=rates.betas, weight_decay=rates.weight_decay
    )

    def iterate(number: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad(set_to_none=True)
            autoencoder(stream.next().images).backward()
            optimizer.step()

    return Peer(iterate)


if __name__ == "__main__":
    main("timm", build, packages=("timm",))
