"""What a run leaves is a timm checkpoint: timm computes the same features from it."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

from mlomae.models.encoder import SIZES, pool_features
from tests.integration.tiny import Fields, tiny_config, train, without_pictures


@pytest.mark.parametrize(
    "fields",
    [{}, {"model.img_size": [8, 12]}, {"model.pool": "cls", "model.patch_size": 4}],
    ids=["square", "wide", "cls"],
)
def test_a_timm_transformer_of_the_same_size_loads_it(
    fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pictures(monkeypatch)
    trainer = train(tiny_config({"run_dir": tmp_path, "iterations": 2, **fields}))
    model = trainer.config.model
    embed_dim, depth, num_heads = SIZES[model.arch]
    vit = VisionTransformer(
        img_size=model.size, patch_size=model.patch_size, in_chans=1, num_classes=0,
        embed_dim=embed_dim, depth=depth, num_heads=num_heads,
        global_pool="token" if model.pool == "cls" else "avg", fc_norm=False,
    )  # fmt: skip
    vit.load_state_dict(load_file(tmp_path / "encoder.safetensors"), strict=True)
    images = trainer.loaders.sample("train", 8).images

    with torch.no_grad():
        expected = trainer.levels.pretrain.autoencoder.encoder(images)
        tokens, features = vit.eval().forward_features(images), vit(images)

    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(features, pool_features(expected, model.pool), rtol=0, atol=1e-6)


def test_create_model_loads_a_named_architecture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)
    trainer = train(tiny_config({"run_dir": tmp_path, "iterations": 1, "model.arch": "vit_tiny"}))
    images = trainer.loaders.sample("train", 8).images

    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=8, patch_size=2, in_chans=1, num_classes=0,
        checkpoint_path=str(tmp_path / "encoder.safetensors"),
    )  # fmt: skip

    with torch.no_grad():
        expected = trainer.levels.pretrain.autoencoder.encoder(images)
        features = vit.eval()(images)
    torch.testing.assert_close(features, expected[:, 0], rtol=0, atol=1e-6)
