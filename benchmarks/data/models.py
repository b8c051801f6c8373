"""The models that train on images of CIFAR's size here: what changes in recipes/cifar10_micro.yaml."""

from __future__ import annotations

MODELS: dict[str, dict[str, str]] = {
    "tiny": {"model.arch": "vit_pico", "model.decoder_dim": "32", "model.decoder_depth": "1"},
    "micro": {},
}
