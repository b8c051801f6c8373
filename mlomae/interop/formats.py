"""The files of other libraries, written: each format's own names and configuration."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mlomae.checkpoint_file import safetensors_parts, write_file
from mlomae.config import load_config
from mlomae.errors import UserError
from mlomae.interop.names import join_hf, join_mae
from mlomae.interop.pretrained import FACTS, Facts, Pretrained
from mlomae.interop.reading import CONFIG, LAYER_NORM_EPS, PREPROCESSOR
from mlomae.interop.runs import CONFIG as RUN_CONFIG
from mlomae.interop.traced import write_onnx, write_pt2
from mlomae.models.encoder import SIZES

WEIGHTS = "model.safetensors"
# timm's models of these sizes; the others are made of the tiny one.
_TIMM_NAMES = {
    "vit_tiny": "vit_tiny_patch16_224",
    "vit_small": "vit_small_patch16_224",
    "vit_base": "vit_base_patch16_224",
    "vit_large": "vit_large_patch16_224",
    "vit_huge": "vit_huge_patch14_224",
}
_BICUBIC = 3  # Pillow's number


def write_timm(pretrained: Pretrained, folder: Path) -> None:
    """config.json and model.safetensors, as timm stores them for the hub."""
    width, depth, heads = SIZES[pretrained.arch]
    # timm cannot join two pools; the class token comes first in ours.
    pool = "avg" if pretrained.pool == "mean" else "token"
    arguments: dict[str, Any] = {
        "img_size": list(pretrained.img_size),
        "patch_size": pretrained.patch_size,
        "in_chans": pretrained.in_chans,
        "num_classes": 0,
        "global_pool": pool,
        "fc_norm": False,
    }
    if pretrained.arch not in _TIMM_NAMES:
        arguments |= {"embed_dim": width, "depth": depth, "num_heads": heads}
    config = {
        "architecture": _TIMM_NAMES.get(pretrained.arch, _TIMM_NAMES["vit_tiny"]),
        "num_classes": 0,
        "num_features": width,
        "global_pool": pool,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [pretrained.in_chans, *pretrained.img_size],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": list(pretrained.mean),
            "std": list(pretrained.std),
            "num_classes": 0,
            "classifier": "head",
        },
        FACTS: Facts.of(pretrained).model_dump(mode="json"),
    }
    _write_folder(folder, pretrained.encoder, {CONFIG: config})


def write_hf(pretrained: Pretrained, folder: Path) -> None:
    """A ViTMAEForPreTraining.

    Raises:
        UserError: there is no decoder, or the grid is not square.
    """
    decoder, heads = pretrained.decoder, pretrained.decoder_heads
    if decoder is None or heads is None:
        raise UserError(
            f"--to hf: {pretrained.source} has no decoder, which ViTMAEForPreTraining needs; use "
            "--to hf-vit, or give a run directory with a checkpoint"
        )
    if pretrained.grid[0] != pretrained.grid[1]:
        raise UserError(
            f"--to hf: a ViTMAE has a square grid of patches, this encoder has {list(pretrained.grid)}; "
            "use --to hf-vit"
        )
    dim = len(decoder["embed.weight"])
    config = {
        **_hf_config(pretrained, "vit_mae", "ViTMAEForPreTraining"),
        "decoder_hidden_size": dim,
        "decoder_num_hidden_layers": pretrained.decoder_depth,
        "decoder_num_attention_heads": heads,
        "decoder_intermediate_size": 4 * dim,
        "norm_pix_loss": pretrained.norm_pix,
        "mask_ratio": _mask_ratio(pretrained),
    }
    _write_hf(folder, pretrained, join_hf(pretrained.encoder, decoder, "vit."), config)


def write_hf_vit(pretrained: Pretrained, folder: Path) -> None:
    """A ViTModel without a pooler."""
    config = _hf_config(pretrained, "vit", "ViTModel")
    _write_hf(folder, pretrained, join_hf(pretrained.encoder, {}, ""), config)


def write_mae(pretrained: Pretrained, path: Path) -> None:
    """A state dict under ``model``, with the decoder where there is one: tensors and plain data only."""
    facts = Facts.of(pretrained).model_dump(mode="json")
    torch.save({"model": join_mae(pretrained.encoder, pretrained.decoder or {}), FACTS: facts}, path)


def _hf_config(pretrained: Pretrained, model_type: str, architecture: str) -> dict[str, Any]:
    width, depth, heads = SIZES[pretrained.arch]
    height, columns = pretrained.img_size
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "image_size": height if height == columns else [height, columns],
        "patch_size": pretrained.patch_size,
        "num_channels": pretrained.in_chans,
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "hidden_act": "gelu",
        "qkv_bias": True,
        "layer_norm_eps": LAYER_NORM_EPS,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        FACTS: Facts.of(pretrained).model_dump(mode="json"),
    }


def _write_hf(
    folder: Path, pretrained: Pretrained, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    height, width = pretrained.img_size
    preprocessor = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": _BICUBIC,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(pretrained.mean),
        "image_std": list(pretrained.std),
    }
    _write_folder(folder, tensors, {CONFIG: config, PREPROCESSOR: preprocessor})


def _mask_ratio(pretrained: Pretrained) -> float:
    """Of the run; MAE's where the weights do not come from one."""
    if pretrained.run is None:
        return 0.75
    return load_config(pretrained.run / RUN_CONFIG, {}).masking.ratio


def _write_folder(
    folder: Path, tensors: Mapping[str, Tensor], configs: Mapping[str, Mapping[str, Any]]
) -> None:
    folder.mkdir()
    for name, config in configs.items():
        (folder / name).write_text(json.dumps(config, indent=2) + "\n")
    write_file(folder / WEIGHTS, safetensors_parts(tensors))


WRITERS: dict[str, Callable[[Pretrained, Path], None]] = {
    "timm": write_timm,
    "hf": write_hf,
    "hf-vit": write_hf_vit,
    "mae": write_mae,
    "onnx": write_onnx,
    "pt2": write_pt2,
}
"""By the keys of ``mlomae.interop.targets.TARGETS``: puts weights at a path where nothing is yet."""
