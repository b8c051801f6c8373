"""A head that labels pixels teaches the masks: whole runs on scenes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mlomae.cli import main
from mlomae.distributed.env import join_world
from mlomae.meters import Scalars
from mlomae.run_dir import RunDir
from mlomae.score_pixels import score_pixels
from mlomae.trainer import Trainer
from tests.data.made_scenes import NUM_CLASSES, UNLABELLED, write_scenes
from tests.distributed.ranks import run_ranks
from tests.integration.tiny import (
    read_metrics,
    read_result,
    tiny_config,
    train,
    without_pictures,
    write_recipe,
)

SIZE = (16, 24)
FIGURES = {"head_miou", "head_pixel_accuracy"}
# Measured: 3e-7, from sums in another order.
LOSS_BOUND = 1e-5


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("scenes")
    write_scenes(root, "training", 40, SIZE)
    write_scenes(root, "validation", 10, SIZE, first=100)
    write_scenes(root, "testing", 6, SIZE, first=200)
    return root


def fields_of(scenes: Path, **more: Any) -> dict[str, Any]:
    return {
        "model.img_size": list(SIZE), "model.patch_size": 4, "model.in_chans": 3, "data.dataset": "scenes",
        "data.path": str(scenes), "data.num_classes": NUM_CLASSES, "data.void": [UNLABELLED],
        "data.augment": "crop-flip", **{name.replace("__", "."): value for name, value in more.items()},
    }  # fmt: skip


def trainer_of(fields: dict[str, Any]) -> Trainer:
    config = tiny_config(fields)
    return Trainer(config, RunDir(config.run_dir, config), join_world("cpu"), None)


def test_a_run_from_the_command_line(scenes: Path, tmp_path: Path) -> None:
    fields = fields_of(scenes, iterations=8, head__lr=0.1)
    recipe = write_recipe(tmp_path / "tiny.yaml", fields)
    assert main(["train", "--config", str(recipe), "--run-dir", str(tmp_path / "run")]) == 0

    result, rows = read_result(tmp_path / "run"), read_metrics(tmp_path / "run")
    assert result.keys() >= FIGURES
    assert not [name for name in result if "knn" in name or "linear" in name]
    assert len(rows) == 8
    assert rows[0]["loss/head"] == pytest.approx(np.log(NUM_CLASSES), abs=0.1)
    assert all(0 <= row["accuracy/head"] <= 1 and row["loss/mask"] > 0 for row in rows)
    # The greys tell the labels: more than chance is soon learned.
    assert result["head_pixel_accuracy"] > 0.5
    with Image.open(tmp_path / "run" / "mask.png") as picture:
        assert picture.width > 100


def test_each_answer_of_the_head_teaches_another_mask(scenes: Path) -> None:
    weights = []
    for more in ({}, {"levels": 2}, {"hypergradient__best_response": "implicit"}):
        trainer = trainer_of(fields_of(scenes, head__lr=0.1, **more))
        trainer.iterate(0)
        assert trainer.levels.mask is not None
        module = trainer.levels.mask.engine.module
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    one_step, stays, optimal = weights
    for other in (stays, optimal):
        assert not torch.allclose(one_step, other, rtol=1e-3, atol=1e-6)


def test_the_figures_are_those_of_the_pixels(scenes: Path) -> None:
    trainer = trainer_of(fields_of(scenes, eval__batch_size=4))
    level = trainer.levels.head
    assert level is not None
    encoder = trainer.levels.pretrain.autoencoder.encoder
    torch.nn.init.normal_(level.engine.module.linear.weight)

    found = score_pixels(encoder, level, trainer.loaders, trainer.world)

    pairs = []
    for number in range(100, 110):  # from the files, one pixel after the other
        pixels = np.array(Image.open(scenes / "images" / "validation" / f"{number}.png"))
        truth = np.array(Image.open(scenes / "annotations" / "validation" / f"{number}.png"))
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
        mean, std = (torch.tensor(c)[:, None, None] for c in (trainer.loaders.mean, trainer.loaders.std))
        with torch.no_grad():
            logits = level.engine.module(encoder((image - mean) / std)[:, 1:])
        pairs += zip(truth.ravel(), logits[0].argmax(0).numpy().ravel(), strict=True)
    pairs = [(t, p) for t, p in pairs if t != UNLABELLED]
    both = [sum(t == p == c for t, p in pairs) for c in range(NUM_CLASSES)]
    either = [sum(c in pair for pair in pairs) for c in range(NUM_CLASSES)]
    assert found["head_pixel_accuracy"] == pytest.approx(sum(both) / len(pairs))
    assert found["head_miou"] == pytest.approx(np.mean([b / e for b, e in zip(both, either, strict=True)]))


def test_a_policy_without_head_has_no_figures_of_it(scenes: Path, tmp_path: Path) -> None:
    fields = fields_of(scenes, run_dir=tmp_path / "run", masking__policy="random", iterations=1)
    result = Trainer.evaluate(train(tiny_config(fields)))
    assert result["policy"] == "random"
    assert not [name for name in result if "accuracy" in name or "miou" in name]


def test_a_resumed_run_equals_an_undisturbed_one(
    scenes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pictures(monkeypatch)

    def fields(name: str, **more: Any) -> dict[str, Any]:
        return fields_of(scenes, run_dir=tmp_path / name, data__augment="resized-crop", **more)

    train(tiny_config(fields("whole")))
    iterate = Trainer.iterate

    def stop(self: Trainer, iteration: int) -> Any:
        if iteration == 3:
            raise KeyboardInterrupt
        return iterate(self, iteration)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "iterate", stop)
        train(tiny_config(fields("parts")))
    train(tiny_config(fields("parts")))

    whole, parts = (read_metrics(tmp_path / name) for name in ("whole", "parts"))
    last = {row["step"]: row for row in parts}
    assert [last[step] for step in (1, 2, 3, 4)] == whole


def test_the_fields_of_scenes_are_honoured(scenes: Path) -> None:
    def labels(**more: Any) -> tuple[Any, ...]:
        trainer = trainer_of(fields_of(scenes, **more))
        batch = trainer.loaders.pretrain.next()
        assert batch.labels is not None and trainer.levels.head is not None
        classes = trainer.levels.head.engine.module.linear.out_features
        return classes, batch.labels.unique().tolist(), trainer.loaders.sizes

    classes, values, sizes = labels()
    assert (classes, values) == (3, [0, 1, 2, 255])
    # Without void, 7 is the eighth class; with the first label 1, label 0 counts nowhere.
    assert labels(data__num_classes=8, data__void=[])[:2] == (8, [0, 1, 2, 7])
    shifted = labels(data__num_classes=2, data__first_label=1, data__void=[0, UNLABELLED])
    assert shifted[:2] == (2, [0, 1, 255])
    assert sizes["test"] == 10 and labels(data__test="testing")[2]["test"] == 6
    swapped = labels(data__train="validation", data__test="training", **{
        f"{level}__batch_size": 1 for level in ("pretrain", "head", "mask")
    })[2]  # fmt: skip
    assert swapped["train"] + swapped["heldout"] == 10 and swapped["test"] == 40


def test_commands_that_look_at_a_run_take_scenes(
    scenes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = str(write_recipe(tmp_path / "tiny.yaml", fields_of(scenes)))
    assert main(["hypergrad-check", "--config", recipe, "--images", "2", "--json"]) == 0
    estimates = json.loads(capsys.readouterr().out)
    assert all(row["cosine"] > 0.99 for row in estimates)
    assert main(["plan", "--config", recipe, "--classes", str(NUM_CLASSES), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)
    trace = str(tmp_path / "trace.json")
    assert main(["profile", "--config", recipe, "--iterations", "1", "--trace", trace, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["figures"]["images_per_second"] > 0


Curve = tuple[list[dict[str, float]], dict[str, float]]


def _curve(fields: dict[str, Any], ranks: int) -> Curve:
    trainer = trainer_of(fields)
    assert trainer.world.size == ranks
    curve = []
    for iteration in range(3):
        trainer.iterate(iteration)
        curve.append(Scalars(trainer.meters.take()).read())
    encoder = trainer.levels.pretrain.autoencoder.encoder
    return curve, score_pixels(encoder, trainer.levels.head, trainer.loaders, trainer.world)


def _curve_of_rank(fields: dict[str, Any]) -> Curve:
    join_world("cpu", always_group=True)
    return _curve(fields, 2)


@pytest.mark.dist
def test_two_ranks_equal_one(scenes: Path) -> None:
    fields = fields_of(scenes, head__lr=0.1)
    expected, figures = _curve(fields, 1)
    ranks = run_ranks(2, _curve_of_rank, fields)
    for curve, found in ranks:
        # The probe's pixels flip where two classes are equally likely.
        assert found == pytest.approx(figures, abs=5e-3)
        for row, other in zip(expected, curve, strict=True):
            for name in ("loss/pretrain", "loss/head", "loss/mask", "accuracy/head"):
                assert other[name] == pytest.approx(row[name], abs=LOSS_BOUND), name
    assert ranks[0] == ranks[1]
