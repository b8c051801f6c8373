"""Small models with every weight random, and what other libraries store of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mlomae import checkpoint
from mlomae.checkpoint_folder import ENCODER
from mlomae.config import Config, dump_config
from mlomae.models.mae import MaskedAutoencoder
from mlomae.run_dir import link_atomically
from tests.integration.tiny import tiny_config

# A ViT of the size vit_pico in timm's words.
PICO = {"embed_dim": 64, "depth": 2, "num_heads": 4}
SMALL: dict[str, Any] = {
    "model.arch": "vit_pico", "model.img_size": 16, "model.patch_size": 4, "model.in_chans": 3,
    "model.decoder_dim": 32, "model.decoder_depth": 2, "model.decoder_heads": 4, "model.pool": "cls",
    "data.dataset": "folder", "data.path": "photos",
}  # fmt: skip
DIGITS: dict[str, Any] = {"data__dataset": "digits", "data__path": None, "model__in_chans": 1}
EXACT = {"rtol": 0, "atol": 0}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def config_of(**fields: Any) -> Config:
    """``model__pool="mean"`` sets model.pool."""
    given = {name.replace("__", "."): value for name, value in fields.items()}
    return tiny_config({**SMALL, **given})


def shuffled(module: nn.Module, seed: int = 0, scale: float = 0.1) -> nn.Module:
    """Noise on every parameter, so that no two are alike and none is at zero or one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return module


def autoencoder_of(config: Config, seed: int = 0) -> MaskedAutoencoder:
    """The same weights for the same configuration and seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = MaskedAutoencoder(config.model)
    shuffled(module, seed)
    return module.eval()


def write_run(folder: Path, config: Config, autoencoder: MaskedAutoencoder, step: int = 1) -> Path:
    """A run directory as training leaves it, but for what no reader of weights looks at."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump_config(config))
    tensors = {f"pretrain.weight.{name}": tensor for name, tensor in autoencoder.state_dict().items()}
    tensors |= {"pretrain.exp_avg.decoder.norm.bias": torch.ones(3), "mask.weight.bias": torch.ones(2)}
    path = checkpoint.save(folder / "checkpoints", step, tensors, {}, keep=9, score=None)
    link_atomically(path / ENCODER, folder / ENCODER)
    return folder


def images_of(config: Config, batch: int = 3, seed: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, config.model.in_chans, *config.model.size, generator=generator)


def hf_mae(eps: float = 1e-6, **fields: Any) -> Any:
    """A ViTMAEForPreTraining of the size vit_pico."""
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    config = ViTMAEConfig(
        **hf_fields(eps), decoder_hidden_size=32, decoder_num_hidden_layers=2, decoder_num_attention_heads=4,
        decoder_intermediate_size=128, **fields,
    )  # fmt: skip
    return shuffled(ViTMAEForPreTraining(config)).eval()


def hf_fields(eps: float = 1e-6) -> dict[str, Any]:
    return {
        "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256,
        "image_size": 16, "patch_size": 4, "num_channels": 3, "layer_norm_eps": eps,
    }  # fmt: skip


def in_order(images: Tensor, patches: int = 16) -> Tensor:
    """The noise that makes a ViTMAE take its patches as they come."""
    return torch.linspace(0, 1, patches).expand(len(images), patches)


def assert_equal(found: Any, expected: Any) -> None:
    """Two state dicts, bit for bit."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, **EXACT, msg=lambda text, name=name: f"{name}: {text}"
        )
