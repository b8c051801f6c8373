"""Weights of every kind that is read: the tensors bit for bit, and features against the library's own."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor

from mlomae import load_encoder
from mlomae.interop.reading import read_pretrained
from mlomae.interop.vit import resample_positions
from mlomae.models.encoder import pool_features
from tests.integration.tiny import train, without_pictures
from tests.interop.made import (
    CLOSE,
    DIGITS,
    PICO,
    assert_equal,
    autoencoder_of,
    config_of,
    hf_fields,
    hf_mae,
    images_of,
    in_order,
    shuffled,
    write_run,
)

IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def timm_vit(**options: Any) -> VisionTransformer:
    vit = VisionTransformer(img_size=16, patch_size=4, **{"num_classes": 0, **PICO, **options})
    shuffled(vit)
    return vit.eval()


def features(path: Path, images: Tensor = IMAGES) -> Tensor:
    with torch.inference_mode():
        return load_encoder(path)(images)


@pytest.mark.parametrize("pool", ["cls", "mean", "cls+mean"])
def test_a_run_has_encoder_decoder_and_facts(pool: str, tmp_path: Path) -> None:
    config = config_of(model__pool=pool, model__img_size=[8, 16], model__norm_pix=False, **DIGITS)
    autoencoder = autoencoder_of(config)
    run = write_run(tmp_path / "run", config, autoencoder)

    found = read_pretrained(run)

    assert_equal(found.encoder, autoencoder.encoder.state_dict())
    assert_equal(found.decoder, autoencoder.decoder.state_dict())
    assert (found.arch, found.img_size, found.grid) == ("vit_pico", (8, 16), (2, 4))
    assert (found.patch_size, found.in_chans, found.pool) == (4, 1, pool)
    assert (found.mean, found.std) == ((0.305,), (0.376,))  # of digits
    assert (found.norm_pix, found.decoder_heads, found.run) == (False, 4, run)
    images = images_of(config)
    with torch.no_grad():
        expected = pool_features(autoencoder.encoder(images), pool)
    torch.testing.assert_close(features(run, images), expected, rtol=0, atol=1e-5)


def test_a_trained_run_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)
    trainer = train(config_of(run_dir=tmp_path, iterations=2, model__img_size=8, **DIGITS))
    autoencoder = trainer.levels.pretrain.autoencoder

    found = read_pretrained(tmp_path)

    assert_equal(found.encoder, autoencoder.encoder.state_dict())
    assert_equal(found.decoder, autoencoder.decoder.state_dict())


def test_checkpoints_of_a_run_are_read_apart(tmp_path: Path) -> None:
    config = config_of()
    older, newer = autoencoder_of(config, seed=1), autoencoder_of(config, seed=2)
    for step, autoencoder in ((1, older), (2, newer)):
        write_run(tmp_path, config, autoencoder, step)

    for path, autoencoder in ((tmp_path / "checkpoints/step-00000001", older), (tmp_path, newer)):
        found = read_pretrained(path)
        assert_equal(found.encoder, autoencoder.encoder.state_dict())
        assert_equal(found.decoder, autoencoder.decoder.state_dict())
        assert found.run == tmp_path


@pytest.mark.parametrize("where", ["encoder.safetensors", "checkpoints/step-00000001/encoder.safetensors"])
def test_the_file_of_a_runs_encoder_is_read_with_the_runs_facts(where: str, tmp_path: Path) -> None:
    config = config_of(model__img_size=[8, 32], model__pool="mean")  # as many patches as a square
    autoencoder = autoencoder_of(config)
    write_run(tmp_path, config, autoencoder)

    found = read_pretrained(tmp_path / where)

    assert_equal(found.encoder, autoencoder.encoder.state_dict())
    assert (found.decoder, found.img_size, found.pool) == (None, (8, 32), "mean")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [(None, ""), (None, "encoder."), ("model", "module."), ("state_dict", "module.encoder.")],
)
def test_a_file_in_timms_layout(suffix: str, wrapper: str | None, prefix: str, tmp_path: Path) -> None:
    vit = timm_vit(num_classes=5)
    state = {f"{prefix}{name}": tensor for name, tensor in vit.state_dict().items()}
    path = tmp_path / f"vit{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(
            state if wrapper is None else {wrapper: state, "epoch": 3, "args": Namespace(lr=1.0)}, path
        )

    found = read_pretrained(path)

    assert_equal(found.encoder, {n: t for n, t in vit.state_dict().items() if not n.startswith("head.")})
    assert (found.arch, found.img_size, found.patch_size, found.pool) == ("vit_pico", (16, 16), 4, "cls")
    assert (found.mean, found.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert (found.decoder, found.run) == (None, None)
    vit.reset_classifier(0)
    with torch.inference_mode():
        torch.testing.assert_close(features(path), vit(IMAGES), **CLOSE)


def test_the_norm_after_an_averaged_pool_becomes_the_encoders(tmp_path: Path) -> None:
    vit = timm_vit(global_pool="avg", num_classes=5)
    assert "norm.weight" not in vit.state_dict()
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")

    found = read_pretrained(tmp_path / "vit.safetensors")

    assert found.pool == "mean"
    torch.testing.assert_close(found.encoder["norm.weight"], vit.fc_norm.weight.detach())
    torch.testing.assert_close(found.encoder["norm.bias"], vit.fc_norm.bias.detach())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: tensor.to(dtype) for name, tensor in timm_vit().state_dict().items()}
    save_file(state, tmp_path / "vit.safetensors")

    found = read_pretrained(tmp_path / "vit.safetensors")

    assert_equal(found.encoder, {name: tensor.float() for name, tensor in state.items()})


@pytest.mark.parametrize(
    ("options", "pool"),
    [
        ({}, "cls"),
        ({"global_pool": "avg", "fc_norm": False}, "mean"),
        ({"img_size": (16, 32), "in_chans": 1}, "cls"),
    ],
    ids=["token", "avg", "wide grey"],
)
def test_a_folder_that_timm_wrote_for_the_hub(options: dict[str, Any], pool: str, tmp_path: Path) -> None:
    sizes = {"img_size": 16, "patch_size": 4, "num_classes": 3, **PICO}
    vit = timm.create_model("vit_tiny_patch16_224", **{**sizes, **options}).eval()
    shuffled(vit)
    # Newer releases of timm add the arguments by themselves.
    save_for_hf(vit, str(tmp_path / "hub"), model_args={**sizes, **options}, safe_serialization=True)

    found = read_pretrained(tmp_path / "hub")

    assert (found.arch, found.pool, found.img_size) == ("vit_pico", pool, vit.patch_embed.img_size)
    assert set(found.mean) == set(found.std) == {0.5}  # as timm trained this one, not ImageNet's
    assert found.source == tmp_path / "hub" / "model.safetensors"
    assert read_pretrained(found.source).mean == found.mean  # with the config.json beside it
    vit.reset_classifier(0)
    images = torch.randn(2, found.in_chans, *found.img_size)
    with torch.inference_mode():
        torch.testing.assert_close(features(tmp_path / "hub", images), vit(images), **CLOSE)


def test_three_equal_statistics_are_those_of_a_grey_image(tmp_path: Path) -> None:
    sizes = {"img_size": 16, "patch_size": 4, "in_chans": 1, **PICO}
    vit = timm.create_model("vit_tiny_patch16_224", **sizes)
    save_for_hf(vit, str(tmp_path), model_args=sizes, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    config["pretrained_cfg"] |= {"mean": [0.25] * 3, "std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps(config))

    found = read_pretrained(tmp_path)

    assert (found.mean, found.std) == ((0.25,), (0.5,))


@pytest.mark.parametrize("norm_pix", [None, False, True])
def test_the_layout_of_mae(norm_pix: bool | None, tmp_path: Path) -> None:
    config = config_of(model__decoder_heads=16, model__decoder_dim=64)
    autoencoder = autoencoder_of(config)
    names = {"embed": "decoder_embed", "pos_embed": "decoder_pos_embed", "blocks": "decoder_blocks",
             "norm": "decoder_norm", "pred": "decoder_pred", "mask_token": "mask_token"}  # fmt: skip
    state = dict(autoencoder.encoder.state_dict())
    for name, tensor in autoencoder.decoder.state_dict().items():
        first, dot, rest = name.partition(".")
        state[names[first] + dot + rest] = tensor
    beside = {} if norm_pix is None else {"args": Namespace(norm_pix_loss=norm_pix, model="mae_vit")}
    torch.save({"model": state, **beside}, tmp_path / "mae.pth")

    found = read_pretrained(tmp_path / "mae.pth")

    assert_equal(found.encoder, autoencoder.encoder.state_dict())
    assert_equal(found.decoder, autoencoder.decoder.state_dict())
    assert found.decoder_heads == 16
    assert found.norm_pix is (norm_pix is not False)


def test_mask_token_without_a_decoder_is_left_out(tmp_path: Path) -> None:
    torch.save({"model": {**timm_vit().state_dict(), "mask_token": torch.zeros(1, 1, 8)}}, tmp_path / "m.pth")
    assert read_pretrained(tmp_path / "m.pth").decoder is None


@pytest.mark.parametrize("saved", ["whole", "sharded", "pickled", "version 4"])
def test_a_folder_of_vit_mae(saved: str, tmp_path: Path) -> None:
    model = hf_mae(norm_pix_loss=True)
    model.save_pretrained(tmp_path, max_shard_size="100KB" if saved == "sharded" else "5GB")
    stored = tmp_path / "model.safetensors"
    if saved == "sharded":
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    if saved in ("pickled", "version 4"):
        from safetensors.torch import load_file

        state = load_file(stored)
        stored.unlink()
        if saved == "pickled":
            torch.save(state, tmp_path / "pytorch_model.bin")
        else:  # which calls the decoder's layers so
            old = {n.replace("decoder_encoder.layer", "decoder_layers"): t for n, t in state.items()}
            assert any(".decoder_layers." in name for name in old)
            save_file(old, stored)

    found = read_pretrained(tmp_path)

    assert (found.arch, found.img_size, found.pool) == ("vit_pico", (16, 16), "cls")
    assert (found.norm_pix, found.decoder_heads) == (True, 4)
    assert found.decoder is not None
    theirs = model.decoder.decoder_layers[1].attention
    qkv = torch.cat([theirs.q_proj.weight, theirs.k_proj.weight, theirs.v_proj.weight]).detach()
    torch.testing.assert_close(found.decoder["blocks.1.attn.qkv.weight"], qkv, rtol=0, atol=0)
    model.vit.config.mask_ratio = 0.0
    with torch.inference_mode():
        expected = model.vit(IMAGES, noise=in_order(IMAGES)).last_hidden_state
        torch.testing.assert_close(load_encoder(tmp_path).tokens(IMAGES), expected, **CLOSE)


@pytest.mark.parametrize("size", ["5GB", "100KB"])
@pytest.mark.parametrize("kind", ["ViTMAEModel", "ViTModel", "ViTForImageClassification"])
def test_folders_of_hugging_faces_encoders(kind: str, size: str, tmp_path: Path) -> None:
    import transformers

    config = (transformers.ViTMAEConfig if kind == "ViTMAEModel" else transformers.ViTConfig)(**hf_fields())
    model = shuffled(getattr(transformers, kind)(config)).eval()
    model.save_pretrained(tmp_path, max_shard_size=size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (size == "100KB")
    transformers.ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(
        tmp_path
    )

    found = read_pretrained(tmp_path)

    assert found.decoder is None
    assert (found.mean, found.std) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    base = model.vit if kind == "ViTForImageClassification" else model
    noise = {"noise": in_order(IMAGES)} if kind == "ViTMAEModel" else {}
    base.config.mask_ratio = 0.0
    with torch.inference_mode():
        expected = base(IMAGES, **noise).last_hidden_state[:, 0]
    torch.testing.assert_close(features(tmp_path), expected, **CLOSE)


def test_another_epsilon_is_told_and_matters_little(tmp_path: Path) -> None:
    model = hf_mae(eps=1e-12)
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match=r"config\.json: layer_norm_eps is 1e-12, and 1e-06 is used here"):
        found = features(tmp_path)

    model.vit.config.mask_ratio = 0.0
    with torch.inference_mode():
        expected = model.vit(IMAGES, noise=in_order(IMAGES)).last_hidden_state[:, 0]
    assert 1e-6 < (found - expected).abs().max() < 1e-4  # measured: 3e-5, with tokens of small variance


@pytest.mark.parametrize("size", [24, (16, 24)], ids=str)
def test_another_grid_is_timms_own_resampling(size: Any, tmp_path: Path) -> None:
    vit = timm_vit()
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    theirs = VisionTransformer(img_size=size, patch_size=4, num_classes=0, **PICO).eval()
    theirs.load_state_dict(checkpoint_filter_fn(vit.state_dict(), theirs))

    encoder = load_encoder(tmp_path / "vit.safetensors", img_size=size)

    images = torch.randn(2, 3, *encoder.img_size)
    assert encoder.vit.pos_embed is not None and vit.pos_embed is not None
    assert encoder.vit.pos_embed.shape != vit.pos_embed.shape
    with torch.inference_mode():
        torch.testing.assert_close(encoder(images), theirs(images), **CLOSE)


def test_grids_of_as_many_patches_are_told_apart() -> None:
    ramp = torch.arange(4.0).repeat_interleave(16)[None, :, None]
    found = resample_positions(torch.cat([torch.full((1, 1, 1), 9.0), ramp], dim=1), (4, 16), (8, 8))
    assert found[0, 0, 0] == 9
    rows = found[0, 1:, 0].unflatten(0, (8, 8))
    torch.testing.assert_close(rows, rows[:, :1].expand(8, 8))
    assert (rows[1:, 0] > rows[:-1, 0]).all()
