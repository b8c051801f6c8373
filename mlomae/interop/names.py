"""The names that each library gives to the same tensors: pure renaming, in both directions.

``encoder``: timm's names. ``decoder``: those of ``mlomae.models.mae.Decoder``. A name that no rule knows is
passed on as it is, so that the check that follows can say which it was.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

# facebookresearch/mae's decoder; its encoder has timm's names.
_MAE_DECODER = {
    "embed.": "decoder_embed.",
    "pos_embed": "decoder_pos_embed",
    "blocks.": "decoder_blocks.",
    "norm.": "decoder_norm.",
    "pred.": "decoder_pred.",
    "mask_token": "mask_token",
}
_HF_ENCODER = {
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj.": "embeddings.patch_embeddings.projection.",
    "norm.": "layernorm.",
}
_HF_DECODER = {
    "embed.": "decoder.decoder_embed.",
    "mask_token": "decoder.mask_token",
    "pos_embed": "decoder.decoder_pos_embed",
    "norm.": "decoder.decoder_norm.",
    "pred.": "decoder.decoder_pred.",
}
_HF_BLOCK = {
    "norm1.": "layernorm_before.",
    "attn.proj.": "attention.output.dense.",
    "norm2.": "layernorm_after.",
    "mlp.fc1.": "intermediate.dense.",
    "mlp.fc2.": "output.dense.",
}
_HF_QKV = ("query", "key", "value")
# transformers 4 stores a decoder's layers under the first name, transformers 5 under the second; both read
# both.
_HF_LAYER = re.compile(
    r"(?:encoder\.layer|decoder\.decoder_layers|decoder\.decoder_encoder\.layer)\.(\d+)\.(.+)"
)
# Parts of Hugging Face's models beside the encoder's tokens.
_HF_HEADS = ("pooler.", "classifier.")


def split_mae(tensors: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
    """facebookresearch/mae's names → encoder and decoder, which is empty where there is none."""
    encoder: Tensors = {}
    decoder: Tensors = {}
    for name, tensor in tensors.items():
        ours = _renamed(name, {theirs: ours for ours, theirs in _MAE_DECODER.items()})
        (encoder if ours is None else decoder)[ours or name] = tensor
    # Files without a decoder may still hold the token that its input is filled up with.
    return encoder, decoder if decoder.keys() - {"mask_token"} else {}


def join_mae(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]) -> Tensors:
    """The inverse of ``split_mae``."""
    return {**encoder, **{_renamed(name, _MAE_DECODER) or name: tensor for name, tensor in decoder.items()}}


def split_hf(tensors: Mapping[str, Tensor]) -> tuple[Tensors, Tensors]:
    """Hugging Face's names on the disk → encoder and decoder, which is empty where there is none."""
    encoder: Tensors = {}
    decoder: Tensors = {}
    for stored, tensor in tensors.items():
        name = stored.removeprefix("vit.")
        if not name.startswith(_HF_HEADS):
            part, table = (decoder, _HF_DECODER) if name.startswith("decoder.") else (encoder, _HF_ENCODER)
            part[_from_hf(name, table)] = tensor
    return _join_qkv(encoder), _join_qkv(decoder)


def join_hf(encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor], prefix: str) -> Tensors:
    """The inverse of ``split_hf``, in the names that transformers 4 stores and transformers 5 reads.

    Args:
        prefix: before the encoder's names: ``vit.`` in a model that is more than an encoder.
    """
    joined = _to_hf(encoder, _HF_ENCODER, "encoder.layer", prefix)
    return joined | _to_hf(decoder, _HF_DECODER, "decoder.decoder_layers", "")


def _renamed(name: str, table: Mapping[str, str]) -> str | None:
    """By the rule whose key begins the name (those that end in a dot) or is the name."""
    for old, new in table.items():
        if name == old or (old.endswith(".") and name.startswith(old)):
            return new + name.removeprefix(old)
    return None


def _from_hf(name: str, table: Mapping[str, str]) -> str:
    layer = _HF_LAYER.fullmatch(name)
    if layer is None:
        return _renamed(name, {theirs: ours for ours, theirs in table.items()}) or name
    rules = {theirs: ours for ours, theirs in _HF_BLOCK.items()}
    rules |= {f"attention.attention.{part}.": f"attn.{part}." for part in _HF_QKV}
    ours = _renamed(layer[2], rules)
    return name if ours is None else f"blocks.{layer[1]}.{ours}"


def _join_qkv(tensors: Tensors) -> Tensors:
    """Queries, keys and values of a block in one tensor."""
    joined: Tensors = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(blocks\.\d+\.attn\.)(query|key|value)\.(weight|bias)", name)
        parts = found and [f"{found[1]}{part}.{found[3]}" for part in _HF_QKV]
        if found is None or parts is None or any(part not in tensors for part in parts):
            joined[name] = tensor
        else:
            whole = f"{found[1]}qkv.{found[3]}"
            if whole not in joined:
                joined[whole] = torch.cat([tensors[part] for part in parts])
    return joined


def _to_hf(
    tensors: Mapping[str, Tensor], table: Mapping[str, str], layers: str, prefix: str
) -> dict[str, Tensor]:
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
        if block is None:
            renamed[f"{prefix}{_renamed(name, table)}"] = tensor
        elif block[2].startswith("attn.qkv."):
            for part, third in zip(_HF_QKV, tensor.chunk(3), strict=True):
                kind = block[2].rpartition(".")[2]
                renamed[f"{prefix}{layers}.{block[1]}.attention.attention.{part}.{kind}"] = third
        else:
            renamed[f"{prefix}{layers}.{block[1]}.{_renamed(block[2], _HF_BLOCK)}"] = tensor
    return renamed
