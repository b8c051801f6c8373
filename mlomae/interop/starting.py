"""Continued pretraining: an autoencoder that starts from weights which are there already."""

from __future__ import annotations

from pathlib import Path

from mlomae.errors import UserError
from mlomae.interop.pretrained import Pretrained
from mlomae.interop.reading import read_pretrained
from mlomae.interop.vit import resample_positions
from mlomae.models.mae import MaskedAutoencoder
from mlomae.sections import ModelConfig


def start_from(autoencoder: MaskedAutoencoder, model: ModelConfig) -> str:
    """Loads ``model.weights`` into a new autoencoder: the encoder, and a decoder that is there and fits.

    Position embeddings are the loaded ones, interpolated where the grid differs, and stay fixed: the blocks
    were trained with them, and they need not be sin-cos tables. A decoder that does not fit starts anew.

    Args:
        autoencoder: made of ``model``.

    Returns:
        What was loaded, in one line.

    Raises:
        UserError: the weights cannot be read, or they are of another encoder.
    """
    assert model.weights is not None
    path = Path(model.weights)
    try:
        pretrained = read_pretrained(path)
    except UserError as error:
        raise UserError(f"model.weights: {error}") from None
    for field in ("arch", "patch_size", "in_chans"):
        ours, theirs = getattr(model, field), getattr(pretrained, field)
        if ours != theirs:
            raise UserError(
                f"model.{field}: found {ours}, but the weights in {path} have {theirs}; "
                f"set model.{field}={theirs} or choose other weights"
            )
    encoder = dict(pretrained.encoder)
    encoder["pos_embed"] = resample_positions(encoder["pos_embed"], pretrained.grid, model.grid)
    autoencoder.encoder.load_state_dict(encoder)
    if pretrained.decoder is None:
        return f"weights: encoder of {pretrained.source}; the decoder starts anew, there is none"
    differences = _decoder_differences(pretrained, model)
    if differences:
        return f"weights: encoder of {pretrained.source}; the decoder starts anew: {'; '.join(differences)}"
    decoder = dict(pretrained.decoder)
    decoder["pos_embed"] = resample_positions(decoder["pos_embed"], pretrained.grid, model.grid)
    autoencoder.decoder.load_state_dict(decoder)
    return f"weights: encoder and decoder of {pretrained.source}"


def _decoder_differences(pretrained: Pretrained, model: ModelConfig) -> list[str]:
    assert pretrained.decoder is not None
    there = {
        "decoder_dim": len(pretrained.decoder["embed.weight"]),
        "decoder_depth": pretrained.decoder_depth,
        "decoder_heads": pretrained.decoder_heads,
        "norm_pix": pretrained.norm_pix,
    }
    return [
        f"model.{field} is {getattr(model, field)} here, {value} there"
        for field, value in there.items()
        if getattr(model, field) != value
    ]
