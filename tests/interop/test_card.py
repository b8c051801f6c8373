"""The model card: what the hub reads, code that runs, and figures that are the run's own."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlomae.errors import UserError
from mlomae.interop.command import card_path, export
from mlomae.interop.reading import read_pretrained
from mlomae.interop.targets import TARGETS
from tests.interop.made import autoencoder_of, config_of, write_run


def card_of(folder: Path, to: str = "mae", weights: str | None = None) -> str:
    run = folder / "run"
    if not run.exists():
        config = config_of(model__weights=weights, data__path="/some/where/photos", model__pool="cls+mean")
        write_run(run, config, autoencoder_of(config))
    out = folder / f"out-{to}{TARGETS[to].suffix}"
    export(read_pretrained(run), to, out)
    return card_path(out, to).read_text()


def front_matter(card: str) -> Any:
    _, head, _ = card.split("---\n", 2)
    return yaml.safe_load(head)


@pytest.mark.parametrize(
    "to", [pytest.param(to, marks=pytest.mark.slow) if to == "onnx" else to for to in TARGETS]
)
def test_the_code_of_a_card_runs(to: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    card = card_of(tmp_path, to)
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    monkeypatch.chdir(tmp_path)

    names: dict[str, Any] = {}
    exec(block, names)

    assert names["images"].shape == (1, 3, 16, 16)
    if to == "hf":
        assert names["loss"].dim() == 0
    elif to == "hf-vit":
        assert names["tokens"].shape == (1, 17, 64)
    else:  # timm joins no two pools, which its card says
        assert names["features"].shape == (1, 64 if to == "timm" else 128)
    assert ("Those of this library are the\nclass token alone" in card) is TARGETS[to].folder
    assert front_matter(card)["library_name"] == TARGETS[to].library


def test_the_card_tells_architecture_data_and_recipe(tmp_path: Path) -> None:
    card = card_of(tmp_path)

    head = front_matter(card)
    assert head["pipeline_tag"] == "image-feature-extraction" and "mae" in head["tags"]
    assert "license" not in head  # it is not known
    assert "| architecture | vit_pico: width 64, 2 blocks, 4 heads |" in card
    assert "| features | 128 numbers: cls+mean of the tokens |" in card
    assert "Data set: folder, `photos`." in card and "/some/where" not in card and str(tmp_path) not in card
    (recipe,) = re.findall(r"```yaml\n(.*?)```", card, re.DOTALL)
    fields = yaml.safe_load(recipe)
    config = config_of()
    assert fields["pretrain.lr"] == config.pretrain.lr
    assert fields["masking.policy"] == config.masking.policy
    assert fields["model.decoder_heads"] == 4
    assert "started from" not in card and card.endswith("it depends on the data.\n")


def test_the_card_has_the_runs_figures(tmp_path: Path) -> None:
    config = config_of()
    run = write_run(tmp_path / "run", config, autoencoder_of(config))
    (run / "result.json").write_text(json.dumps({"knn_accuracy": 0.75, "loss": None}))
    rows = [
        {"time": "2026", "out": "/x/y", "task": "linear", "encoder": "/x", "scratch": False, "accuracy": 0.5},
        {
            "time": "2026",
            "out": "/x/z",
            "task": "finetune",
            "encoder": "/x",
            "scratch": True,
            "accuracy": 0.25,
        },
    ]
    (run / "evaluations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    card = card_of(tmp_path)

    assert "| after pretraining, test set | knn_accuracy 0.75 |" in card
    assert "| linear | accuracy 0.5 |\n| finetune, from scratch | accuracy 0.25 |" in card
    assert "/x" not in card

    (run / "evaluations.jsonl").write_text('{"task": "knn"}\n{"task":')
    with pytest.raises(UserError, match=r"evaluations\.jsonl: line 2 is no JSON object"):
        card_of(tmp_path, "timm")
    assert not (tmp_path / "out-timm").exists()


def test_the_licence_of_a_source_is_not_forgotten(tmp_path: Path) -> None:
    card = card_of(tmp_path / "a", weights="/some/where/mae_pretrain_vit_base.pth")
    assert "started from `mae_pretrain_vit_base.pth`: check the source's licence" in card
    export(read_pretrained(tmp_path / "a/out-mae.pth"), "timm", tmp_path / "b")
    card = (tmp_path / "b/README.md").read_text()
    assert "They come from `out-mae.pth`: check the source's licence" in card and "## Training" not in card
