"""Plain MAE steps of ``ViTMAEForPreTraining`` in transformers: a second yardstick beside our own."""

from __future__ import annotations

from pathlib import Path

from transformers import ViTMAEConfig, ViTMAEForPreTraining

from benchmarks.peers.measure import Peer, main
from benchmarks.peers.plain_steps import plain_peer
from mlomae.config import Config
from mlomae.models.encoder import SIZES


def build(config: Config, folder: Path, iterations: int) -> Peer:
    return plain_peer(
        config,
        iterations,
        lambda: ViTMAEForPreTraining(_translate(config)),
        lambda model, images: model(pixel_values=images).loss,
    )


def _translate(config: Config) -> ViTMAEConfig:
    model = config.model
    width, depth, heads = SIZES[model.arch]
    return ViTMAEConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        decoder_hidden_size=model.decoder_dim,
        decoder_num_hidden_layers=model.decoder_depth,
        decoder_num_attention_heads=model.decoder_heads,
        decoder_intermediate_size=4 * model.decoder_dim,
        image_size=model.size[0],
        patch_size=model.patch_size,
        num_channels=model.in_chans,
        mask_ratio=config.masking.ratio,
        norm_pix_loss=model.norm_pix,
        layer_norm_eps=1e-6,
    )


if __name__ == "__main__":
    main("vitmae", build, packages=("transformers",))
