"""Plain MAE steps as one writes them with timm's blocks and torch's AdamW: the third yardstick."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu_parts.models import Model
from benchmarks.gpu_parts.timm_peer import TimmAutoencoder
from benchmarks.peers.measure import Peer, main
from benchmarks.peers.plain_steps import plain_peer
from mlomae.config import Config
from mlomae.models.encoder import SIZES


def build(config: Config, folder: Path, iterations: int) -> Peer:
    model = config.model
    width, depth, heads = SIZES[model.arch]
    size = Model(
        key="peer", title=model.arch, arch=model.arch, width=width, depth=depth, heads=heads,
        patch_size=model.patch_size, batch=config.pretrain.batch_size, compiled_mfu=None,
        img_size=model.size[0], decoder_dim=model.decoder_dim, decoder_depth=model.decoder_depth,
        decoder_heads=model.decoder_heads,
    )  # fmt: skip
    return plain_peer(
        config, iterations, lambda: TimmAutoencoder(size), lambda autoencoder, images: autoencoder(images)
    )


if __name__ == "__main__":
    main("timm", build, packages=("timm",))
