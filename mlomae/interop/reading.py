"""Finds out what a path holds and reads the weights in it (docs/interop.md)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from timm.models import VisionTransformer, create_model, is_model
from torch import Tensor, nn

from mlomae.errors import UserError
from mlomae.interop.checks import Found, complete
from mlomae.interop.files import FOLDER_FILES, read_folder, read_json, read_tensors
from mlomae.interop.names import split_hf, split_mae
from mlomae.interop.pretrained import Pretrained
from mlomae.interop.runs import read_run, run_of
from mlomae.run_dir import first_few

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"
LAYER_NORM_EPS = 1e-6
_HF_MODELS = ("vit", "vit_mae")
_TIMM_POOLS = {"token": "cls", "avg": "mean"}


def read_pretrained(path: Path) -> Pretrained:
    """The weights of a run, a checkpoint, or a file or folder of timm, facebookresearch/mae or Hugging Face.

    Args:
        path: a run directory; a checkpoint of one; a ``.safetensors``, ``.pth``, ``.pt`` or ``.bin`` file; a
            folder with a ``config.json``. A file named as in such a folder is read with its config.json.

    Raises:
        UserError: nothing usable is there; one line says what was found.
    """
    if not path.exists():
        raise UserError(f"{path}: is not there; expected a run directory, or a file or folder with weights")
    run = run_of(path)
    if run is not None:
        return complete(read_run(path, run))
    if path.name in FOLDER_FILES and (path.parent / CONFIG).is_file():
        path = path.parent
    return complete(_read_folder(path) if path.is_dir() else _read_file(path))


def _read_folder(folder: Path) -> Found:
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder}: holds neither config.yaml (a run) nor {CONFIG} (timm, Hugging Face)")
    config = read_json(folder / CONFIG)
    if "architecture" in config:
        return _read_timm(folder, config)
    if config.get("model_type") in _HF_MODELS:
        return _read_hf(folder, config)
    kind = config.get("model_type", "no model_type")
    raise UserError(
        f"{folder / CONFIG}: is of {kind}; expected {' or '.join(_HF_MODELS)}, or timm's architecture"
    )


def _read_file(path: Path) -> Found:
    """A file alone: it tells neither normalisation nor, but for avg-pool models, what features are."""
    tensors, beside = read_tensors(path)
    if any("embeddings.cls_token" in name for name in tensors):
        raise UserError(f"{path}: is in Hugging Face's layout; give its folder with the {CONFIG}")
    encoder, decoder = split_mae(tensors)
    encoder, pool = _without_head(encoder)
    # MAE's trainer stores its command line; where it is missing, the target is that of MAE's recipe.
    norm_pix = getattr(beside.get("args"), "norm_pix_loss", True)
    return Found(path, encoder, decoder, pool=pool, norm_pix=bool(norm_pix)).told(beside)


def _read_timm(folder: Path, config: Mapping[str, Any]) -> Found:
    vit = _build_timm(folder, config)
    tensors, source = read_folder(folder)
    encoder, pool = _without_head(tensors)
    given = config.get("pretrained_cfg")
    if not isinstance(given, Mapping):
        given = config
    return Found(
        source,
        encoder,
        img_size=vit.patch_embed.img_size,
        num_heads=_first_block(vit).attn.num_heads,
        pool=_TIMM_POOLS.get(vit.global_pool, pool),
        mean=given.get("mean"),
        std=given.get("std"),
    ).told(config)


def _build_timm(folder: Path, config: Mapping[str, Any]) -> VisionTransformer:
    """timm's own model, without memory for weights: it tells what a list of tensors does not."""
    architecture, arguments = config["architecture"], config.get("model_args") or {}
    # timm would also follow addresses and paths of weights: a folder from elsewhere describes, no more.
    if not isinstance(architecture, str) or not is_model(architecture):
        raise UserError(f"{folder / CONFIG}: architecture is {architecture!r}, which timm has no model of")
    known = signature(VisionTransformer).parameters
    foreign = [name for name in arguments if name not in known] if isinstance(arguments, dict) else ["all"]
    if foreign:
        raise UserError(f"{folder / CONFIG}: model_args: {first_few(foreign)}: expected a ViT's arguments")
    try:
        with torch.device("meta"):
            vit = create_model(architecture, pretrained=False, **arguments)
    except Exception as error:  # whatever a model's code raises on arguments of others
        reason = " ".join(str(error).split())
        raise UserError(f"{folder / CONFIG}: timm cannot build {architecture} ({reason})") from None
    if not isinstance(vit, VisionTransformer):
        raise UserError(f"{folder / CONFIG}: {architecture} is a {type(vit).__name__}, no plain ViT")
    block = _first_block(vit)
    act, norm = block.mlp.act, block.norm1
    if not isinstance(act, nn.GELU) or not isinstance(norm, nn.LayerNorm):
        raise UserError(f"{folder / CONFIG}: {architecture} has no GELU and layer norm: no plain ViT")
    _check_eps(folder / CONFIG, norm.eps)
    return vit


def _first_block(vit: VisionTransformer) -> Any:
    return vit.blocks[0]


def _read_hf(folder: Path, config: Mapping[str, Any]) -> Found:
    path = folder / CONFIG
    if config.get("hidden_act", "gelu") != "gelu":
        raise UserError(f"{path}: hidden_act is {config['hidden_act']!r}; only gelu is supported")
    eps = config.get("layer_norm_eps", 1e-12)
    if not isinstance(eps, float | int):
        raise UserError(f"{path}: layer_norm_eps is {eps!r}, expected a number")
    _check_eps(path, eps)
    tensors, source = read_folder(folder)
    encoder, decoder = split_hf(tensors)
    size = config.get("image_size", 224)
    given = read_json(folder / PREPROCESSOR) if (folder / PREPROCESSOR).is_file() else {}
    return Found(
        source,
        encoder,
        decoder,
        img_size=size if isinstance(size, list) else (size, size),
        num_heads=config.get("num_attention_heads", 12),
        mean=given.get("image_mean"),
        std=given.get("image_std"),
        norm_pix=bool(config.get("norm_pix_loss", False)),
        decoder_heads=config.get("decoder_num_attention_heads", 16),
    ).told(config)


def _check_eps(path: Path, eps: float) -> None:
    if eps > LAYER_NORM_EPS:
        raise UserError(f"{path}: layer_norm_eps is {eps:g}; this package computes with {LAYER_NORM_EPS:g}")
    if eps != LAYER_NORM_EPS:
        # Numbers of variance v move by the share eps / 2v.
        warnings.warn(
            f"{path}: layer_norm_eps is {eps:g}, and {LAYER_NORM_EPS:g} is used here: features differ by "
            "about 1e-5",
            stacklevel=4,
        )


def _without_head(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], str]:
    """The encoder of timm's classifier, and the pool that its names tell.

    With an averaged pool timm may normalise after it, by a layer of its own, which then is the only one.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("head.")}
    averaged = {f"norm.{kind}": f"fc_norm.{kind}" for kind in ("weight", "bias")}
    if "norm.weight" in kept or "fc_norm.weight" not in kept:
        return kept, "cls"
    for ours, theirs in averaged.items():
        if theirs in kept:
            kept[ours] = kept.pop(theirs)
    return kept, "mean"
