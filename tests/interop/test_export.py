"""``mlomae export``: each format in the library that it is for, and back again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor

from mlomae import load_encoder
from mlomae.cli import main
from mlomae.errors import UserError
from mlomae.interop import traced
from mlomae.interop.command import export
from mlomae.interop.names import join_mae
from mlomae.interop.pretrained import Pretrained
from mlomae.interop.reading import read_pretrained
from mlomae.interop.targets import TARGETS
from mlomae.models.mae import MaskedAutoencoder
from mlomae.precision import set_float32_products
from tests.interop.made import (
    CLOSE,
    DIGITS,
    assert_equal,
    autoencoder_of,
    config_of,
    images_of,
    in_order,
    write_run,
)


def run_of(folder: Path, **fields: Any) -> Pretrained:
    config = config_of(**fields)
    return read_pretrained(write_run(folder / "run", config, autoencoder_of(config)))


def images_for(pretrained: Pretrained, batch: int = 3) -> Tensor:
    return torch.randn(batch, pretrained.in_chans, *pretrained.img_size)


def features(path: Path, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return load_encoder(path)(images)


def assert_same(found: Pretrained, expected: Pretrained) -> None:
    """All but where they came from."""
    assert_equal(found.encoder, expected.encoder)
    if expected.decoder is not None:
        assert found.decoder is not None
        assert_equal(found.decoder, expected.decoder)
    same = {"encoder": {}, "decoder": None, "source": Path(), "run": None}
    assert replace(found, **same) == replace(expected, **same)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model__pool": "mean", **DIGITS},
        {"model__img_size": [8, 24], "model__pool": "cls+mean"},
        {"model__arch": "vit_tiny"},
    ],
    ids=["cls", "mean grey", "wide", "named"],
)
def test_timm(fields: dict[str, Any], tmp_path: Path) -> None:
    pretrained, out = run_of(tmp_path, **fields), tmp_path / "out"
    export(pretrained, "timm", out)

    vit = timm.create_model(f"local-dir:{out}", pretrained=True).eval()

    images = images_for(pretrained)
    with torch.inference_mode():
        expected = features(tmp_path / "run", images)
        if pretrained.pool == "cls+mean":  # timm joins no two pools
            expected = expected[:, : vit.num_features]
        torch.testing.assert_close(vit(images), expected, **CLOSE)
    config = vit.pretrained_cfg
    assert (tuple(config["mean"]), tuple(config["std"])) == (pretrained.mean, pretrained.std)
    assert tuple(config["input_size"]) == (pretrained.in_chans, *pretrained.img_size)
    classifier = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=7)
    assert classifier(images).shape == (3, 7)
    assert_same(read_pretrained(out), replace(pretrained, decoder=None, decoder_heads=None))


def test_timms_checkpoint_path_loads_the_file(tmp_path: Path) -> None:
    pretrained = run_of(tmp_path, model__arch="vit_tiny")
    export(pretrained, "timm", tmp_path / "out")
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, num_classes=0,
        checkpoint_path=str(tmp_path / "out/model.safetensors"),
    ).eval()  # fmt: skip
    assert_equal(vit.state_dict(), pretrained.encoder)


@pytest.mark.parametrize("fields", [{}, {"model__norm_pix": False, **DIGITS}], ids=["colour", "grey"])
def test_hugging_faces_vit_mae(fields: dict[str, Any], tmp_path: Path) -> None:
    from transformers import ViTImageProcessor, ViTMAEForPreTraining

    pretrained, out = run_of(tmp_path, **fields), tmp_path / "out"
    export(pretrained, "hf", out)

    model, report = ViTMAEForPreTraining.from_pretrained(out, output_loading_info=True)

    assert not any(report.values())
    assert model.config.layer_norm_eps == 1e-6
    assert (model.config.norm_pix_loss, model.config.mask_ratio) == (pretrained.norm_pix, 0.5)
    config = config_of(**fields)
    images = images_of(config)
    model.config.mask_ratio = model.vit.config.mask_ratio = 0.0
    with torch.inference_mode():
        tokens = model.eval().vit(images, noise=in_order(images)).last_hidden_state
        torch.testing.assert_close(load_encoder(tmp_path / "run").tokens(images), tokens, **CLOSE)
    processor = ViTImageProcessor.from_pretrained(out)
    assert (tuple(processor.image_mean), tuple(processor.image_std)) == (pretrained.mean, pretrained.std)
    assert_same(read_pretrained(out), pretrained)


@pytest.mark.parametrize("size", [16, [8, 24]], ids=str)
def test_hugging_faces_vit(size: Any, tmp_path: Path) -> None:
    from transformers import ViTModel

    pretrained, out = run_of(tmp_path, model__img_size=size), tmp_path / "out"
    export(pretrained, "hf-vit", out)

    model, report = ViTModel.from_pretrained(out, add_pooling_layer=False, output_loading_info=True)

    assert not any(report.values())
    images = images_for(pretrained)
    with torch.inference_mode():
        tokens = model.eval()(images).last_hidden_state
        torch.testing.assert_close(load_encoder(tmp_path / "run").tokens(images), tokens, **CLOSE)
    assert_same(read_pretrained(out), replace(pretrained, decoder=None, decoder_heads=None))


@pytest.mark.parametrize(
    "fields", [{}, {"model__img_size": [8, 24], "model__pool": "mean"}], ids=["", "wide"]
)
def test_mae(fields: dict[str, Any], tmp_path: Path) -> None:
    pretrained = run_of(tmp_path, **fields)
    export(pretrained, "mae", tmp_path / "out.pth")
    content = torch.load(tmp_path / "out.pth", weights_only=True)
    assert_equal(content["model"], join_mae(pretrained.encoder, pretrained.decoder or {}))
    assert_same(read_pretrained(tmp_path / "out.pth"), pretrained)


def test_names_and_shapes_are_those_of_maes_vit_b() -> None:
    def linear(name: str, inputs: int, outputs: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def block(name: str, width: int) -> dict[str, tuple[int, ...]]:
        norms = {f"{name}.norm{n}.{kind}": (width,) for n in (1, 2) for kind in ("weight", "bias")}
        attention = linear(f"{name}.attn.qkv", width, 3 * width) | linear(f"{name}.attn.proj", width, width)
        return (
            norms
            | attention
            | linear(f"{name}.mlp.fc1", width, 4 * width)
            | linear(f"{name}.mlp.fc2", 4 * width, width)
        )

    expected: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, 768), "pos_embed": (1, 197, 768), "mask_token": (1, 1, 512),
        "patch_embed.proj.weight": (768, 3, 16, 16), "patch_embed.proj.bias": (768,),
        "norm.weight": (768,), "norm.bias": (768,), "decoder_pos_embed": (1, 197, 512),
        "decoder_norm.weight": (512,), "decoder_norm.bias": (512,),
        **linear("decoder_embed", 768, 512), **linear("decoder_pred", 512, 768),
    }  # fmt: skip
    for number in range(12):
        expected |= block(f"blocks.{number}", 768)
    for number in range(8):
        expected |= block(f"decoder_blocks.{number}", 512)
    base = config_of(
        model__arch="vit_base", model__img_size=224, model__patch_size=16, model__decoder_dim=512,
        model__decoder_depth=8, model__decoder_heads=16,
    )  # fmt: skip
    with torch.device("meta"):
        module = MaskedAutoencoder(base.model)

    joined = join_mae(module.encoder.state_dict(), module.decoder.state_dict())

    assert {name: tuple(tensor.shape) for name, tensor in joined.items()} == expected


@pytest.mark.slow
def test_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    pretrained, out = run_of(tmp_path, model__pool="cls+mean", model__img_size=[8, 16]), tmp_path / "out.onnx"
    export(pretrained, "onnx", out)

    session = onnxruntime.InferenceSession(out)

    for batch in (1, 5):
        images = images_for(pretrained, batch)
        (found,) = session.run(["features"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), features(tmp_path / "run", images), **CLOSE)
    assert '"pool": ' in session.get_modelmeta().custom_metadata_map["mlomae"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.onnx", "out.onnx.md", "run"]

    # A graph of other features is not kept; weights above the limit go to a second file.
    large = tmp_path / "large.onnx"
    monkeypatch.setattr(traced, "_ONNX_LIMIT", 1000)
    monkeypatch.setattr(traced, "_TOLERANCE", 0.0)
    assert "computes features that differ by" in refusal(pretrained, "onnx", large)
    monkeypatch.undo()
    monkeypatch.setattr(traced, "_ONNX_LIMIT", 1000)
    export(pretrained, "onnx", large)
    assert large.with_name("large.onnx.data").stat().st_size > large.stat().st_size
    images = images_for(pretrained)
    (found,) = onnxruntime.InferenceSession(large).run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), features(tmp_path / "run", images), **CLOSE)


def test_pt2_in_a_process_that_has_trained(tmp_path: Path) -> None:
    pretrained = run_of(tmp_path, model__pool="mean", model__img_size=[8, 16])
    conv: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = torch.backends.cudnn.allow_tf32
    try:
        set_float32_products("float32")  # as training does, once and for all
        export(pretrained, "pt2", tmp_path / "out.pt2")
        assert conv.fp32_precision != "tf32"
    finally:
        torch.backends.cudnn.allow_tf32 = before

    program = torch.export.load(tmp_path / "out.pt2").module()

    for batch in (1, 5):
        images = images_for(pretrained, batch)
        torch.testing.assert_close(program(images), features(tmp_path / "run", images), **CLOSE)


def refusal(pretrained: Pretrained, to: str, out: Path) -> str:
    before = sorted(out.parent.iterdir())
    with pytest.raises(UserError) as caught:
        export(pretrained, to, out)
    assert sorted(out.parent.iterdir()) == before
    return str(caught.value)


def test_what_a_format_cannot_hold_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretrained, out = run_of(tmp_path, model__img_size=[8, 24]), tmp_path / "out"
    assert "--to hf: a ViTMAE has a square grid of patches, this encoder has [2, 6]" in refusal(
        pretrained, "hf", out
    )
    assert "has no decoder, which ViTMAEForPreTraining needs; use --to hf-vit" in refusal(
        replace(pretrained, decoder=None), "hf", out
    )
    monkeypatch.setattr(traced, "find_spec", lambda name: None)
    assert (
        refusal(pretrained, "onnx", out.with_suffix(".onnx"))
        == "--to onnx: onnx, onnxscript, onnxruntime not installed; pip install 'mlomae[onnx]'"
    )


@pytest.mark.parametrize("to", TARGETS)
def test_nothing_is_overwritten(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of(tmp_path)
    out = tmp_path / f"out{TARGETS[to].suffix}"
    card = out / "README.md" if TARGETS[to].folder else out.with_name(f"{out.name}.md")
    card.parent.mkdir(exist_ok=True)
    card.write_text("mine")

    assert main(["export", str(tmp_path / "run"), "--to", to, "--out", str(out)]) == 2

    there = out if TARGETS[to].folder else card
    assert capsys.readouterr().err.startswith(
        f"mlomae: error: --out: {there} is there already; choose another"
    )
    assert card.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"run", there.name}


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    pretrained = run_of(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*file/out: cannot be written \("):
        export(pretrained, "timm", tmp_path / "file" / "out")


def test_the_command_tells_where_everything_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_of(tmp_path)
    out = tmp_path / "new" / "mae.pth"
    assert main(["export", str(tmp_path / "run"), "--to", "mae", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"mae: {out}\ncard: {out}.md\n"
    assert main(["export", str(tmp_path / "run"), "--to", "onnx", "--out", str(out)]) == 2
    assert "mae.pth: expected the name of a file that ends in .onnx" in capsys.readouterr().err
    assert main(["export", str(tmp_path / "run"), "--to", "gguf", "--out", str(out)]) == 2
    assert "invalid choice: 'gguf'" in capsys.readouterr().err
