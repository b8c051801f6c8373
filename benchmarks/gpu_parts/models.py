"""The models that are measured, and one plain pretraining step of them as a user's program takes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

EXECUTIONS = ("eager", "compiled", "graphs")
_BYTES_FOR_FULL_BATCH = 70e9
_RATES = {"lr": 1.5e-4, "betas": (0.9, 0.95), "eps": 1e-8}


@dataclass(frozen=True)
class Model:
    """A masked autoencoder of a published size, 75 % of the patches removed.

    Attributes:
        key: short name.
        title: name in tables.
        arch: of ``mlomae.config.ModelConfig``.
        width, depth, heads: of the encoder.
        batch: images per step.
        compiled_mfu: what a compiled step has to reach of the measured peak; None where nothing is asked for.
    """

    key: str
    title: str
    arch: str
    width: int
    depth: int
    heads: int
    patch_size: int
    batch: int
    compiled_mfu: float | None
    img_size: int = 224
    decoder_dim: int = 512
    decoder_depth: int = 8
    decoder_heads: int = 16
    # Of ``ModelConfig`` too, so that a machine without pydantic can build the network.
    in_chans: int = 3
    norm_pix: bool = True
    predict: str = "removed"
    attention: str = "auto"

    @property
    def num_patches(self) -> int:
        return (self.img_size // self.patch_size) ** 2

    @property
    def num_keep(self) -> int:
        return self.num_patches // 4

    @property
    def size(self) -> tuple[int, int]:
        return self.img_size, self.img_size

    @property
    def grid(self) -> tuple[int, int]:
        return (self.img_size // self.patch_size,) * 2

    def fields(self) -> dict[str, Any]:
        """Of ``mlomae.config.ModelConfig``."""
        return {
            "arch": self.arch,
            "img_size": self.img_size,
            "patch_size": self.patch_size,
            "decoder_dim": self.decoder_dim,
            "decoder_depth": self.decoder_depth,
            "decoder_heads": self.decoder_heads,
        }


MODELS = {
    "b16": Model("b16", "ViT-B/16", "vit_base", 768, 12, 12, 16, 256, 0.40),
    "l16": Model("l16", "ViT-L/16", "vit_large", 1024, 24, 16, 16, 256, 0.50),
    "h14": Model("h14", "ViT-H/14", "vit_huge", 1280, 32, 16, 14, 128, 0.50),
}
SMOKE_MODEL = Model(
    "smoke", "smoke", "vit_pico", 64, 2, 4, 8, 4, None,
    img_size=32, decoder_dim=32, decoder_depth=2, decoder_heads=2,
)  # fmt: skip


def model_for(key: str, device: torch.device, smoke: bool) -> Model:
    """The model of that key, with half the batch on a small GPU."""
    if smoke:
        return SMOKE_MODEL
    model = MODELS[key]
    small = device.type == "cuda" and (
        torch.cuda.get_device_properties(device).total_memory < _BYTES_FOR_FULL_BATCH
    )
    return replace(model, batch=model.batch // 2) if small else model


def build_autoencoder(model: Model, device: torch.device, attention: str = "auto") -> nn.Module:
    """``mlomae.models.mae.MaskedAutoencoder`` with float32 weights."""
    from mlomae.models.mae import MaskedAutoencoder

    with torch.device(device):
        return MaskedAutoencoder(replace(model, attention=attention))


class PretrainStep:
    """Random masks, forward pass under bf16 autocast, backward pass, AdamW; weights are float32.

    Args:
        smoke: the compiler stops before it generates code, which takes a minute on a CPU.
    """

    def __init__(self, model: Model, device: torch.device, smoke: bool = False) -> None:
        self.model, self.device = model, device
        self.module = build_autoencoder(model, device)
        side = model.img_size
        self.images = torch.randn(model.batch, 3, side, side, device=device)
        self._smoke = smoke
        self._calls: dict[str, Callable[..., Any] | None] = {"eager": None}
        self._optimizer: torch.optim.Optimizer | None = None

    def use(self, execution: str) -> None:
        """Runs the module eager, compiled or in CUDA graphs from here on."""
        if execution not in self._calls:
            self.module._compiled_call_impl = None
            if self._smoke:
                self.module.compile(backend="aot_eager", fullgraph=True, dynamic=False)
            else:
                from mlomae.compilation import compile_module

                compile_module(self.module, execution)
            self._calls[execution] = self.module._compiled_call_impl
        self.module._compiled_call_impl = self._calls[execution]

    def optimise(self, fused: bool) -> None:
        """A fresh AdamW over all trainable weights: fused, or one kernel for each of its operations."""
        self.release()
        weights = [weight for weight in self.module.parameters() if weight.requires_grad]
        groups = [
            {"params": [weight for weight in weights if weight.ndim > 1], "weight_decay": 0.05},
            {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
        ]
        how = {"fused": True} if fused else {"foreach": True}
        self._optimizer = torch.optim.AdamW(groups, **_RATES, **how)

    def release(self) -> None:
        """Gives gradients and moments back."""
        self._optimizer = None
        self.module.zero_grad(set_to_none=True)

    def loss(self) -> Tensor:
        """The forward pass with its random masks."""
        from mlomae.models.selection import PatchSelection
        from mlomae.objectives import pretrain_loss
        from mlomae_kernels import select_patches

        noise = torch.rand(self.model.batch, self.model.num_patches, device=self.device)
        selection = PatchSelection(*select_patches(noise, self.model.num_keep))
        with torch.autocast(self.device.type, torch.bfloat16):
            errors = self.module(self.images, selection)
        return pretrain_loss(errors, selection.mask, None)

    def update(self) -> None:
        """The optimizer's part."""
        assert self._optimizer is not None
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def once(self) -> None:
        """The whole step."""
        self.loss().backward()
        self.update()
