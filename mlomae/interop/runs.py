"""The weights that a run of this package left."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mlomae import checkpoint
from mlomae.checkpoint_folder import ENCODER, newest_first
from mlomae.config import Config, load_config
from mlomae.data.dataset import STATISTICS
from mlomae.errors import UserError
from mlomae.interop.checks import Found
from mlomae.interop.files import read_tensors

CONFIG = "config.yaml"
_CHECKPOINTS = "checkpoints"
_ENCODER = "pretrain.weight.encoder."
_DECODER = "pretrain.weight.decoder."


def run_of(path: Path) -> Path | None:
    """The run directory that a path is, or that it is a checkpoint or an encoder of."""
    folder = path.parent if path.name == ENCODER else path
    candidates = [folder]
    if folder.parent.name == _CHECKPOINTS and folder in newest_first(folder.parent):
        candidates.append(folder.parent.parent)
    return next((candidate for candidate in candidates if (candidate / CONFIG).is_file()), None)


def read_run(path: Path, run: Path) -> Found:
    """The encoder, and the decoder where the path leads to a checkpoint.

    Args:
        path: a run directory, one of its checkpoints, or the file of an encoder in either, which is read
            without a decoder.
        run: its run directory.

    Raises:
        UserError: the run is not one of pretraining, has no weights yet, or they cannot be read.
    """
    try:
        config = load_config(run / CONFIG, {})
    except UserError as error:
        raise UserError(f"{run}: is no run directory of pretraining ({error})") from None
    if path.name == ENCODER:
        return _found(path, run, config, read_tensors(path)[0], {})
    stored = path if path != run else checkpoint.newest(run / _CHECKPOINTS)
    if stored is not None:
        tensors = checkpoint.read(stored).tensors
        encoder, decoder = dict(tensors.under(_ENCODER)), dict(tensors.under(_DECODER))
        return _found(stored, run, config, encoder, decoder)
    if not (run / ENCODER).is_file():
        raise UserError(f"{run}: has no weights yet; wait for the run's first checkpoint")
    return _found(run / ENCODER, run, config, read_tensors(run / ENCODER)[0], {})


def _found(
    source: Path, run: Path, config: Config, encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor]
) -> Found:
    model = config.model
    mean, std = STATISTICS.get(config.data.dataset, (None, None))
    return Found(
        source, encoder, decoder, img_size=model.size, pool=model.pool, mean=mean, std=std,
        norm_pix=model.norm_pix, decoder_heads=model.decoder_heads, run=run,
    )  # fmt: skip
