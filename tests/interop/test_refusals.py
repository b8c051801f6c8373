"""What is no plain ViT, or damaged, or dangerous, is refused in one line that says why."""

from __future__ import annotations

import json
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mlomae.cli import main
from mlomae.errors import UserError
from mlomae.interop.reading import read_pretrained
from tests.interop.made import PICO, autoencoder_of, config_of, hf_fields, write_run

State = dict[str, Tensor]
TINY = {"architecture": "vit_tiny_patch16_224"}


def state_of(**options: Any) -> State:
    vit = VisionTransformer(**{"img_size": 16, "patch_size": 4, "num_classes": 0, **PICO, **options})
    return dict(vit.state_dict())


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read_pretrained(path)
    message = str(caught.value)
    assert "\n" not in message
    assert str(path.name) in message
    return message


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", ["torch.save", "pickle"])
def test_code_in_a_pickle_does_not_run(protocol: str, tmp_path: Path) -> None:
    path, made = tmp_path / "weights.pth", tmp_path / "made"
    content = {"model": state_of(), "extra": Malicious(made)}
    if protocol == "torch.save":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(Malicious(made), protocol=2))

    assert "refused, it holds more than tensors (posix.mkdir)" in refusal(path)

    assert not made.exists()
    with open(path, "rb") as file:  # it would have, otherwise
        pickle.load(file) if protocol == "pickle" else torch.load(file, weights_only=False)
    assert made.exists()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"reg_tokens": 4}, "reg_token is too much"),
        ({"init_values": 0.1}, r"blocks.0.ls1.gamma is too much"),
        (
            {"class_token": False, "global_pool": "avg", "fc_norm": False},
            "cls_token is missing",
        ),
        ({"qk_norm": True}, "blocks.0.attn.k_norm.weight is too much"),
        ({"pre_norm": True}, "norm_pre.weight is too much"),
        ({"qkv_bias": False}, "blocks.0.attn.qkv.bias is missing"),
        ({"mlp_ratio": 2.0}, "blocks.0.mlp.fc1.weight is [128, 64], should be [256, 64]"),
        ({"embed_dim": 48}, "width 48, depth 2 is no known size (vit_pico 64 x 2,"),
        ({"depth": 3}, "width 64, depth 3 is no known size"),
        ({"in_chans": 4}, "is for 4 channels; images have 3 (colour) or 1 (grey)"),
        (
            {"img_size": (16, 32)},
            "pos_embed is [1, 33, 64]: not a class token and a square grid; give the run",
        ),
        ({"patch_size": (4, 2)}, "patch_embed.proj.weight is [64, 3, 4, 2], expected [D, C, P, P]"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_variants_are_refused(options: dict[str, Any], named: str, tmp_path: Path) -> None:
    save_file(state_of(**options), tmp_path / "vit.safetensors")
    assert named in refusal(tmp_path / "vit.safetensors")


def test_distilled_and_gated_ones_are_refused(tmp_path: Path) -> None:
    state = state_of()
    save_file({**state, "dist_token": torch.zeros(1, 1, 64)}, tmp_path / "distilled.safetensors")
    assert "dist_token is too much" in refusal(tmp_path / "distilled.safetensors")
    gated = {name.replace("mlp.fc1", "mlp.fc1_g"): tensor for name, tensor in state.items()}
    save_file(gated, tmp_path / "gated.safetensors")
    assert "blocks.0.mlp.fc1_g.weight is too much" in refusal(tmp_path / "gated.safetensors")


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    state = state_of()
    for name in ("norm.weight", "blocks.1.attn.proj.bias"):
        del state[name]
    save_file(state, tmp_path / "vit.safetensors")
    message = refusal(tmp_path / "vit.safetensors")
    assert "norm.weight is missing" in message and "blocks.1.attn.proj.bias is missing" in message


def test_damaged_and_other_files(tmp_path: Path) -> None:
    whole = tmp_path / "whole.safetensors"
    save_file(state_of(), whole)
    torch.save(state_of(), tmp_path / "whole.pth")
    damaged = {
        "half.safetensors": whole.read_bytes()[: whole.stat().st_size // 2],
        "header.safetensors": whole.read_bytes()[:7],
        "empty.safetensors": b"",
        "text.safetensors": b"some text that is no header",
        "half.pth": (tmp_path / "whole.pth").read_bytes()[:5000],
        "empty.pth": b"",
        "text.pt": b"some text",
        "picture.bin": b"\x89PNG\r\n\x1a\n" + bytes(100),
    }
    for name, content in damaged.items():
        path = tmp_path / name
        path.write_bytes(content)
        assert "damaged, or no" in (message := refusal(path)) or "is damaged or no" in message
    (tmp_path / "weights.npz").write_bytes(b"PK")
    assert "unknown kind of file; expected .safetensors, .pth" in refusal(tmp_path / "weights.npz")
    assert "is not there; expected a run directory" in refusal(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([torch.zeros(1)], "holds no state dict; found list"),
        ({}, "holds no state dict; found dict"),
        ({"model": {"epoch": 3}}, "values that are no tensors: epoch"),
        (
            {"a": torch.zeros(1)},
            "holds no ViT in timm's layout: no patch_embed.proj.weight, pos_embed; found a",
        ),
        ({**state_of(), "norm.bias": torch.zeros(64, dtype=torch.int64)}, "norm.bias is torch.int64"),
        ({**state_of(), "pos_embed": torch.zeros(())}, "pos_embed is [], expected [1, 1 + L, D]"),
        ({**state_of(), "decoder_embed.bias": torch.zeros(8)}, "has an incomplete decoder: embed.bias"),
        ({"model": state_of(), "mlomae": {"pool": "max"}}, "mlomae: pool: input should be 'cls', 'mean'"),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else "",
)
def test_files_of_other_content(content: Any, found: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "weights.pth")
    assert found in refusal(tmp_path / "weights.pth")


def write_hf(folder: Path, **changes: Any) -> Path:
    from transformers import ViTConfig, ViTModel

    ViTModel(ViTConfig(**hf_fields())).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"model_type": "swin"}, "is of swin; expected vit or vit_mae, or timm's architecture"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; only gelu"),
        ({"layer_norm_eps": 1e-5}, "layer_norm_eps is 1e-05; this package computes with 1e-06"),
        ({"num_attention_heads": 8}, "has 8 attention heads, vit_pico has 4"),
        ({"image_size": 18}, "its image size is (18, 18), expected multiples of 4"),
        ({"image_size": "large"}, "its image size is ('large', 'large'), expected multiples of 4"),
        ({"image_size": 16.0}, "its image size is (16.0, 16.0), expected multiples of 4"),
        ({"layer_norm_eps": None}, "layer_norm_eps is None, expected a number"),
        ({"image_size": 32}, "pos_embed is [1, 17, 64], should be [1, 65, 64]"),
        ({"architecture": "vit_of_nowhere"}, "architecture is 'vit_of_nowhere', which timm has no model of"),
        ({"architecture": "hf-hub:some/where"}, "architecture is 'hf-hub:some/where', which timm has no"),
        ({"architecture": ["vit"]}, "architecture is ['vit'], which timm has no model of"),
        (
            {**TINY, "model_args": {"checkpoint_path": "/x.bin"}},
            "model_args: checkpoint_path: expected a ViT's",
        ),
        ({**TINY, "model_args": {"pretrained": True}}, "model_args: pretrained: expected a ViT's arguments"),
        ({**TINY, "model_args": [1]}, "model_args: all: expected a ViT's arguments"),
        ({**TINY, "model_args": {"depth": "x"}}, "timm cannot build vit_tiny_patch16_224"),
        ({**TINY, "pretrained_cfg": None, "mean": 3}, "holds no ViT in timm's layout"),
        ({"architecture": "resnet18"}, "resnet18 is a ResNet, no plain ViT"),
        ({"architecture": "vit_base_patch32_clip_quickgelu_224"}, "has no GELU and layer norm"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_folders_of_other_models(changes: dict[str, Any], found: str, tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", **changes)
    with pytest.raises(UserError) as caught:
        read_pretrained(folder)
    assert found in str(caught.value) and str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("given", "found"), [("0.5", "mean or std is '0.5'"), ([0.5], "mean or std is [0.5]"), (0.25, None)]
)
def test_statistics_of_a_folder(given: Any, found: str | None, tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf", layer_norm_eps=1e-6)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": given}))
    if found is None:
        assert read_pretrained(folder).mean == (0.25,) * 3
    else:
        with pytest.raises(UserError, match=re.escape(found)):
            read_pretrained(folder)


def test_folders_without_weights(tmp_path: Path) -> None:
    assert "holds neither config.yaml (a run) nor config.json" in refusal(tmp_path)
    folder = write_hf(tmp_path / "hf")
    (folder / "config.json").rename(folder / "other.json")
    with pytest.raises(
        UserError, match=r"is in Hugging Face's layout; give its folder with the config\.json"
    ):
        read_pretrained(folder / "model.safetensors")
    (folder / "other.json").rename(folder / "config.json")
    (folder / "preprocessor_config.json").write_text('{"image_mean": [0.5], "image_std": [0.5]}')
    with pytest.raises(UserError, match=r"mean or std is \[0\.5\], expected 3 numbers"):
        read_pretrained(folder)
    (folder / "model.safetensors").unlink()
    assert "holds no weights; expected model.safetensors" in refusal(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: is no valid JSON"):
        read_pretrained(folder)


def test_an_index_must_not_leave_its_folder(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "hf")
    (folder / "model.safetensors").rename(tmp_path / "outside.safetensors")
    index = folder / "model.safetensors.index.json"
    for name, found in (
        ("../outside.safetensors", "names the file '../outside.safetensors', which is not in this folder"),
        ("absent.safetensors", "cannot be read"),
    ):
        index.write_text(json.dumps({"weight_map": {"layernorm.weight": name}}))
        with pytest.raises(UserError) as caught:
            read_pretrained(folder)
        assert found in str(caught.value)
    index.write_text("{}")
    with pytest.raises(UserError, match="has no weight_map"):
        read_pretrained(folder)


def test_runs_that_cannot_be_used(tmp_path: Path) -> None:
    config = config_of()
    run = write_run(tmp_path / "run", config, autoencoder_of(config))
    training = run / "checkpoints/step-00000001/training.safetensors"
    training.write_bytes(training.read_bytes()[:-8])
    with pytest.raises(UserError, match=r"checkpoint .*: training\.safetensors has \d+ bytes, should have"):
        read_pretrained(training.parent)
    with pytest.warns(UserWarning, match="skipped"):
        assert read_pretrained(run).decoder is None  # the encoder beside it is whole

    (tmp_path / "young").mkdir()
    (tmp_path / "young/config.yaml").write_text((run / "config.yaml").read_text())
    assert "has no weights yet; wait for the run's first checkpoint" in refusal(tmp_path / "young")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.yaml").write_text("lrs: [0.1]\n")
    assert "is no run directory of pretraining" in refusal(tmp_path / "other")


def test_the_command_line_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": Malicious(tmp_path / "made")}, tmp_path / "weights.pth")
    assert (
        main(["export", str(tmp_path / "weights.pth"), "--to", "timm", "--out", str(tmp_path / "out")]) == 2
    )
    error = capsys.readouterr().err
    assert error.startswith("mlomae: error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists() and not (tmp_path / "made").exists()
