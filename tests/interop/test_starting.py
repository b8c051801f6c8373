"""Continued pretraining: what an autoencoder starts from is what the source was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from mlomae.config import Config
from mlomae.distributed.env import join_world
from mlomae.errors import UserError
from mlomae.interop.command import export
from mlomae.interop.reading import read_pretrained
from mlomae.interop.starting import start_from
from mlomae.models.mae import MaskedAutoencoder
from mlomae.models.selection import MaskPolicy
from mlomae.objectives import pretrain_loss
from mlomae.run_dir import RunDir
from mlomae.trainer import Trainer
from tests.interop.made import (
    CLOSE,
    DIGITS,
    EXACT,
    assert_equal,
    autoencoder_of,
    config_of,
    hf_mae,
    images_of,
    write_run,
)


def start(config: Config) -> tuple[MaskedAutoencoder, str]:
    torch.manual_seed(5)
    autoencoder = MaskedAutoencoder(config.model)
    return autoencoder, start_from(autoencoder, config.model)


def loss_of(autoencoder: MaskedAutoencoder, config: Config, images: Tensor, noise: Tensor) -> Tensor:
    policy = MaskPolicy(config.masking, config.model.grid, config.num_keep, seed=0)
    selection = policy.keep_lowest(noise)
    with torch.no_grad():
        return pretrain_loss(autoencoder(images, selection), selection.mask, None)


@pytest.mark.parametrize("to", [None, "mae", "hf"])
@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_first_loss_is_the_sources(to: str | None, norm_pix: bool, tmp_path: Path) -> None:
    config = config_of(model__norm_pix=norm_pix)
    source = autoencoder_of(config)
    path = write_run(tmp_path / "run", config, source)
    if to is not None:
        path = tmp_path / ("weights.pth" if to == "mae" else "weights")
        export(read_pretrained(tmp_path / "run"), to, path)

    started, told = start(config_of(model__norm_pix=norm_pix, model__weights=path))

    images, noise = images_of(config), torch.rand(3, 16)
    expected = loss_of(source, config, images, noise)
    torch.testing.assert_close(loss_of(started, config, images, noise), expected, **EXACT)
    assert told.startswith(f"weights: encoder and decoder of {path}")
    assert not started.encoder.pos_embed.requires_grad and not started.decoder.pos_embed.requires_grad


@pytest.mark.parametrize("norm_pix", [True, False])
def test_the_loss_of_hugging_faces_vit_mae_is_ours(norm_pix: bool, tmp_path: Path) -> None:
    model = hf_mae(norm_pix_loss=norm_pix, mask_ratio=0.5)
    model.save_pretrained(tmp_path)
    config = config_of(model__norm_pix=norm_pix, model__weights=tmp_path)
    images, noise = images_of(config), torch.rand(3, 16)

    started, _ = start(config)

    with torch.no_grad():
        theirs = model(images, noise=noise)
    ours = loss_of(started, config, images, noise)
    torch.testing.assert_close(ours, theirs.loss, **CLOSE)
    # And patch by patch, with the numbers of a patch in the same order.
    selection = MaskPolicy(config.masking, (4, 4), config.num_keep, seed=0).keep_lowest(noise)
    with torch.no_grad():
        torch.testing.assert_close(started.reconstruct(images, selection), theirs.logits, **CLOSE)
    torch.testing.assert_close(selection.mask.float(), theirs.mask, **EXACT)


def test_training_starts_from_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields: dict[str, Any] = {
        **DIGITS,
        "model__img_size": 8,
        "model__patch_size": 2,
        "masking__policy": "random",
    }
    source = autoencoder_of(config_of(**fields))
    run = write_run(tmp_path / "source", config_of(**fields), source)
    config = config_of(**fields, run_dir=tmp_path / "next", model__weights=run)

    trainer = Trainer(config, RunDir(config.run_dir, config), join_world("cpu"), None)

    assert f"weights: encoder and decoder of {run}" in capsys.readouterr().err
    level = trainer.levels.pretrain
    assert_equal(level.autoencoder.state_dict(), source.state_dict())
    batch = level.next_batch()
    masked = level.mask(batch)
    with torch.no_grad():
        errors = source(masked.images, masked.selection)
    expected = pretrain_loss(errors, masked.selection.mask, None)
    _, metrics = level.step(batch, 0)
    torch.testing.assert_close(metrics["loss/reconstruction"], expected, **EXACT)


@pytest.mark.parametrize(
    ("field", "here", "told"),
    [
        ("decoder_dim", 64, "model.decoder_dim is 64 here, 32 there"),
        ("decoder_depth", 1, "model.decoder_depth is 1 here, 2 there"),
        ("decoder_heads", 2, "model.decoder_heads is 2 here, 4 there"),
        ("norm_pix", False, "model.norm_pix is False here, True there"),
    ],
)
def test_a_decoder_that_does_not_fit_starts_anew(field: str, here: Any, told: str, tmp_path: Path) -> None:
    source = autoencoder_of(config_of())
    run = write_run(tmp_path, config_of(), source)
    config = config_of(**{f"model__{field}": here})
    torch.manual_seed(5)
    fresh = MaskedAutoencoder(config.model)

    started, line = start(config_of(**{f"model__{field}": here}, model__weights=run))

    assert line.endswith(f"the decoder starts anew: {told}")
    assert_equal(started.encoder.state_dict(), source.encoder.state_dict())
    assert_equal(started.decoder.state_dict(), fresh.decoder.state_dict())


def test_an_encoder_alone_leaves_the_decoder_new(tmp_path: Path) -> None:
    source = autoencoder_of(config_of())
    run = write_run(tmp_path, config_of(), source)
    started, line = start(config_of(model__weights=run / "encoder.safetensors"))
    assert line.endswith("the decoder starts anew, there is none")
    assert_equal(started.encoder.state_dict(), source.encoder.state_dict())


def test_positions_are_interpolated_and_everything_else_kept(tmp_path: Path) -> None:
    source = autoencoder_of(config_of())
    run = write_run(tmp_path, config_of(), source)

    started, _ = start(config_of(model__weights=run, model__img_size=[16, 24]))

    for ours, theirs in ((started.encoder, source.encoder), (started.decoder, source.decoder)):
        expected = dict(theirs.state_dict())
        expected["pos_embed"] = resample_abs_pos_embed(expected["pos_embed"], [4, 6], [4, 4])
        assert expected["pos_embed"].shape[1] == 1 + 24
        assert_equal(ours.state_dict(), expected)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"arch": "vit_micro"}, "model.arch: found vit_micro, but the weights in {run} have vit_pico"),
        (
            {"patch_size": 8},
            "model.patch_size: found 8, but the weights in {run} have 4; set model.patch_size=4",
        ),
        ({"in_chans": 1}, "model.in_chans: found 1, but the weights in {run} have 3"),
        ({"weights": "nowhere"}, "model.weights: nowhere: is not there; expected a run directory"),
    ],
)
def test_other_encoders_are_refused(fields: dict[str, Any], line: str, tmp_path: Path) -> None:
    run = write_run(tmp_path, config_of(), autoencoder_of(config_of()))
    with pytest.raises(UserError) as caught:
        start(config_of(**{"model__weights": run, **{f"model__{n}": v for n, v in fields.items()}}))
    assert str(caught.value).startswith(line.format(run=run))


def test_a_run_from_other_weights_is_another_run(tmp_path: Path) -> None:
    config = config_of(model__weights="one")
    RunDir(tmp_path, config).claim(primary=True)
    with pytest.raises(UserError, match=r"model\.weights is one there, other asked for"):
        RunDir(tmp_path, config_of(model__weights="other")).claim(primary=False)
