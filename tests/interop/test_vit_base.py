"""A ViT-B/16 at its real size: in from timm and transformers, out to every format and back, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

from mlomae.interop.command import export
from mlomae.interop.encoder import Encoder, load_encoder
from mlomae.interop.reading import read_pretrained
from tests.interop.made import CLOSE, assert_equal, in_order, shuffled

pytestmark = pytest.mark.slow

IMAGES = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(7))


def test_timms_vit_base(tmp_path: Path) -> None:
    vit = shuffled(timm.create_model("vit_base_patch16_224", num_classes=0), scale=0.01).eval()
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    pretrained = read_pretrained(tmp_path / "vit.safetensors")
    assert (pretrained.arch, pretrained.img_size, pretrained.patch_size) == ("vit_base", (224, 224), 16)
    with torch.inference_mode():
        expected = vit(IMAGES)
        torch.testing.assert_close(Encoder(pretrained).eval()(IMAGES), expected, **CLOSE)

    export(pretrained, "timm", tmp_path / "timm")
    export(pretrained, "mae", tmp_path / "mae.pth")
    export(pretrained, "hf-vit", tmp_path / "hf")

    back = timm.create_model(
        "vit_base_patch16_224", num_classes=0, checkpoint_path=str(tmp_path / "timm/model.safetensors")
    )
    assert_equal(back.state_dict(), vit.state_dict())
    for path in (tmp_path / "timm", tmp_path / "mae.pth", tmp_path / "hf"):
        assert_equal(read_pretrained(path).encoder, vit.state_dict())


def test_transformers_vit_mae_base(tmp_path: Path) -> None:
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    model: Any = shuffled(ViTMAEForPreTraining(ViTMAEConfig(layer_norm_eps=1e-6)), scale=0.01).eval()
    model.save_pretrained(tmp_path / "theirs")
    pretrained = read_pretrained(tmp_path / "theirs")
    assert (pretrained.arch, pretrained.decoder_heads, pretrained.norm_pix) == ("vit_base", 16, False)

    export(pretrained, "hf", tmp_path / "hf")
    export(pretrained, "mae", tmp_path / "mae.pth")

    back = ViTMAEForPreTraining.from_pretrained(tmp_path / "hf")
    assert_equal(back.state_dict(), model.state_dict())
    read = read_pretrained(tmp_path / "mae.pth")
    assert_equal(read.encoder, pretrained.encoder)
    assert read.decoder is not None and pretrained.decoder is not None
    assert_equal(read.decoder, pretrained.decoder)
    model.vit.config.mask_ratio = 0.0
    with torch.inference_mode():
        expected = model.vit(IMAGES, noise=in_order(IMAGES, 196)).last_hidden_state
        torch.testing.assert_close(load_encoder(tmp_path / "mae.pth").tokens(IMAGES), expected, **CLOSE)


@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_graphs_of_a_vit_base(to: str, tmp_path: Path) -> None:
    vit = shuffled(timm.create_model("vit_base_patch16_224", num_classes=0), scale=0.01)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    pretrained, out = read_pretrained(tmp_path / "vit.safetensors"), tmp_path / f"out.{to}"

    export(pretrained, to, out)

    with torch.inference_mode():
        expected = vit.eval()(IMAGES)
    if to == "pt2":
        found = torch.export.load(out).module()(IMAGES)
    else:
        import onnxruntime

        found = torch.from_numpy(onnxruntime.InferenceSession(out).run(None, {"images": IMAGES.numpy()})[0])
    torch.testing.assert_close(found, expected, **CLOSE)
