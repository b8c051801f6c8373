"""Every field has an effect: an entry says what is changed, and what must then differ from a base run.

Runs are deterministic, which is tested first, so a difference comes from the field.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mlomae import evaluate
from mlomae.config import Config, flatten
from mlomae.data import sources
from mlomae.distributed.engine import TorchEngine
from mlomae.distributed.env import join_world
from mlomae.errors import UserError
from mlomae.hypergradient import Hypergradient
from mlomae.models.attention import PackedAttention
from mlomae.run_dir import RunDir
from mlomae.trainer import Trainer
from tests.integration.tiny import Fields, TrainOnly, read_metrics, tiny_config, train

FIELDS = sorted(flatten(Config().model_dump()))
BASE: dict[str, Any] = {"keep_checkpoints": 9, "data.workers": 0}


@dataclass(frozen=True)
class Effect:
    """What a field is set to, beside which others, and the observation that must change."""

    value: Any
    on: str
    beside: Fields


def on_training(value: Any, **beside: Any) -> Effect:
    """Losses and mask statistics change from some iteration on."""
    return Effect(value, "training", {name.replace("__", "."): v for name, v in beside.items()})


def on(observation: str, value: Any) -> Effect:
    return Effect(value, observation, {})


def of_rates(level: str, **more: Effect) -> dict[str, Effect]:
    """The entries that all levels share."""
    entries = {
        "batch_size": on_training(16),
        "lr": on_training(2e-3),
        "min_lr": on_training(1e-3),
        "warmup": on_training(1.0),
        "weight_decay": on_training(0.7),
        "betas": on_training((0.5, 0.6)),
        "eps": on_training(1e-2),
        "clip": on_training(1e-9),
    }
    return {f"{level}.{name}": entry for name, entry in {**entries, **more}.items()}


EFFECTS: dict[str, Effect] = {
    "seed": on_training(1),
    "iterations": on("lines", 5),
    "levels": on_training(2),
    "run_dir": on("folder", None),
    "device": on("device", "cuda"),
    "deterministic": on("algorithms", True),  # test_determinism.py
    "display": on("screen", "quiet"),  # tests/run/test_metrics.py
    "loggers": on("folders", ()),  # tests/run/test_loggers.py
    "log_every": on("lines", 3),
    "checkpoint_every": on("checkpoints", 3),
    "picture_every": on("pictures", 3),
    "keep_checkpoints": on("checkpoints", 1),
    "model.arch": on_training("vit_micro"),
    "model.weights": on("start", "runs/x"),  # tests/interop/test_starting.py
    "model.img_size": on_training((16, 8)),
    "model.patch_size": on_training(4),
    "model.in_chans": on("channels", 3),
    "model.decoder_dim": on_training(32),
    "model.decoder_depth": on_training(2),
    "model.decoder_heads": on_training(4),
    "model.norm_pix": on_training(False),
    "model.attention": on("attention", "reference"),
    "model.predict": on("predictions", "all"),
    "model.pool": on_training("cls"),
    "masking.policy": on_training("weighted-random"),
    "masking.ratio": on_training(0.75),
    "masking.network": on_training("mlp"),
    "masking.hidden": on_training(16),
    "masking.logit_bound": on_training(0.5),
    "masking.selection": on_training("topk"),
    "masking.temperature": on_training(9.0),
    "masking.random_share": on_training(0.9),
    "masking.hard_share": on("hard masks", 0.9),  # test_controls.py
    "data.dataset": on("images", "folder"),
    "data.path": on("images", None),
    # These four: tests/integration/test_data_sets.py.
    "data.test_path": on("test set", None),
    "data.max_bad_share": on("bad samples", 0.0),
    "data.access": on("order", "sequential"),
    "data.shuffle_buffer": on("order", 8),
    "data.download": on("download", True),
    "data.heldout_fraction": on_training(0.4),
    "data.test_fraction": on_training(0.4),
    "data.split_seed": on_training(1),
    "data.augment": on_training("shift"),
    # Sets that lie in memory need no loader processes.
    "data.workers": Effect(1, "workers", {"data.resident": "never"}),
    "data.resident": on("residence", "never"),
    # Of label maps: test_segmentation_teacher.py.
    **{f"data.{f}": on("scenes", 1) for f in ("train", "test", "num_classes", "first_label", "void")},
    **of_rates("pretrain", unroll_steps=on_training(1), micro_batches=on("micro-batches", 2)),
    "pretrain.label_weight": on_training(0.5),
    **of_rates("head"),
    **of_rates("mask"),
    "hypergradient.estimator": on_training("jvp"),
    "hypergradient.precision": on("precision", "engine"),
    "hypergradient.radius": on_training(1e-2),
    "hypergradient.check_every": on_training(0),
    "hypergradient.best_response": on_training("implicit"),
    "hypergradient.damping": on("implicit runs", 1.0),
    "hypergradient.precondition": on_training("adam"),
    "hypergradient.every": on_training(2),
    "hypergradient.share": on_training(0.5),
    "compute.precision": on_training("bf16"),
    "compute.execution": on("execution", "compiled"),
    "compute.activation_checkpointing": on("checkpointing", True),
    "eval.batch_size": on("evaluation batches", 100),
    "eval.knn_k": on("accuracy", 300),
    "eval.pixels": on("result", True),
    **{f: on("failure", 5) for f in FIELDS if f.startswith("failure.")},  # tests/failure, test_rewind.py
}


class Observed(TrainOnly):
    """Counts pictures and loader processes as it trains."""

    drawn = 0
    workers = 0

    def _draw(self) -> None:
        self.drawn += 1
        Image.new("L", (1, 1)).save(self.run_dir.picture)

    def save(self) -> None:
        self.workers = max(self.workers, len(multiprocessing.active_children()))
        super().save()


def observe(folder: Path, fields: Fields) -> dict[str, Any]:
    """Trains a tiny run and reports what it did."""
    config = tiny_config({"run_dir": folder, **BASE, **fields})
    trainer = train(config, kind=Observed)
    assert isinstance(trainer, Observed)
    rows = read_metrics(folder)
    return {
        # What was learned, not the rates that are logged beside it.
        "training": [{k: v for k, v in row.items() if not k.startswith("lr/")} for row in rows],
        "lines": [row["step"] for row in rows],
        "checkpoints": sorted(path.name for path in (folder / "checkpoints").iterdir()),
        "pictures": trainer.drawn,
        "workers": trainer.workers,
    }


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return observe(tmp_path_factory.mktemp("base") / "run", {})


def test_every_field_has_an_entry() -> None:
    assert sorted(EFFECTS) == FIELDS


def test_runs_are_repeatable(base: dict[str, Any], tmp_path: Path) -> None:
    assert observe(tmp_path / "run", {}) == base


@pytest.mark.parametrize("field", [name for name, effect in EFFECTS.items() if effect.on == "training"])
def test_training_changes_with(field: str, base: dict[str, Any], tmp_path: Path) -> None:
    effect = EFFECTS[field]
    default = flatten(tiny_config(BASE).model_dump())[field]
    assert effect.value != default

    rows = observe(tmp_path / "run", {field: effect.value, **effect.beside})["training"]

    assert any(differ(row, before) for row, before in zip(rows, base["training"], strict=True))


def differ(row: dict[str, Any], before: dict[str, Any]) -> bool:
    """Whether a loss or a mask statistic differs by more than the last bits."""
    return row.keys() != before.keys() or any(
        value != pytest.approx(before[name], rel=1e-6, abs=1e-12)
        for name, value in row.items()
        if isinstance(value, float)
    )


@pytest.mark.parametrize(
    ("field", "expected"),
    [
        ("iterations", [1, 2, 3, 4, 5]),
        ("log_every", [2, 3, 4]),  # checkpoints at 2 and 4 log too
        ("checkpoint_every", ["step-00000003", "step-00000004"]),
        ("picture_every", 2),
        ("data.workers", 3),  # one for each level
    ],
)
def test_what_a_run_leaves_changes_with(
    field: str, expected: Any, base: dict[str, Any], tmp_path: Path
) -> None:
    effect = EFFECTS[field]

    found = observe(tmp_path / "run", {field: effect.value, **effect.beside})[effect.on]

    assert found == expected
    assert found != base[effect.on]


def test_the_newest_checkpoints_and_the_best_stay(tmp_path: Path) -> None:
    often = {"checkpoint_every": 1}
    assert len(observe(tmp_path / "all", often)["checkpoints"]) == 4

    found = observe(tmp_path / "one", {**often, "keep_checkpoints": 1})["checkpoints"]
    assert found[-1] == "step-00000004" and len(found) <= 2


def test_workers_do_not_change_the_numbers(base: dict[str, Any], tmp_path: Path) -> None:
    fields = {"data.workers": 1, "data.resident": "never"}
    assert observe(tmp_path / "run", fields)["training"] == base["training"]


def test_run_dir_receives_everything(tmp_path: Path) -> None:
    train(tiny_config({"run_dir": tmp_path / "some" / "where", "iterations": 1}))
    assert [path.name for path in tmp_path.iterdir()] == ["some"]
    left = {path.name for path in (tmp_path / "some" / "where").iterdir()} - {".lock"}
    pictures = {"mask.png", "pictures.jsonl", "pictures.safetensors"}
    own = {"config.yaml", "environment.json", "metrics.jsonl", "checkpoints", "encoder.safetensors"}
    assert left == {*own, *pictures, "tensorboard"}


def test_device_is_honoured() -> None:
    if torch.cuda.is_available():
        assert join_world("cuda").device.type == join_world("auto").device.type == "cuda"
    else:
        with pytest.raises(UserError, match=r"^device: cuda asked for"):
            join_world("cuda")
    assert join_world("cpu").device.type == "cpu"


def test_in_chans_must_suit_the_data_and_reaches_the_model(fill_images: Callable[..., Path]) -> None:
    folder = fill_images(mode="RGB")
    shapes = {}
    for in_chans in (1, 3):
        fields = {"data.dataset": "folder", "data.path": folder, "model.in_chans": in_chans}
        trainer = build(fields)
        images = trainer.levels.pretrain.next_batch().images
        shapes[in_chans] = (
            images.shape[1],
            trainer.levels.pretrain.autoencoder.encoder.patch_embed.proj.in_channels,
        )
    assert shapes == {1: (1, 1), 3: (3, 3)}
    with pytest.raises(UserError, match=r"^model\.in_chans: found 3, but digits has 1"):
        build({"model.in_chans": 3})


def test_attention_is_chosen_and_told() -> None:
    told = {}
    for backend in ("auto", "reference"):
        trainer = build({"model.attention": backend})
        autoencoder = trainer.levels.pretrain.autoencoder
        layers = [layer for layer in autoencoder.modules() if isinstance(layer, PackedAttention)]
        assert {layer.backend for layer in layers} == {backend}
        assert len(layers) == len(autoencoder.encoder.blocks) + len(autoencoder.decoder.blocks)
        told[backend] = trainer.implementations

    assert "attention: fused (flash-attn does not run on cpu);" in told["auto"]
    assert "attention: reference (as configured);" in told["reference"]
    with pytest.raises(UserError, match=r"^model\.attention: .* flash-attn does not run on cpu"):
        build({"model.attention": "flash"})


def test_predict_chooses_what_the_decoder_computes(base: dict[str, Any], tmp_path: Path) -> None:
    predicted: dict[str, int] = {}
    for choice in ("removed", "all"):
        trainer = build({"model.predict": choice})
        autoencoder = trainer.levels.pretrain.autoencoder
        autoencoder.decoder.pred.register_forward_pre_hook(
            lambda _, inputs, choice=choice: predicted.update({choice: inputs[0].shape[1]})
        )
        trainer.iterate(0)
    assert predicted == {"removed": 8, "all": 16}
    rows = observe(tmp_path / "run", {"model.predict": "all"})["training"]
    for row, before in zip(rows, base["training"], strict=True):
        for name in ("loss/pretrain", "loss/head", "loss/mask"):
            assert row[name] == pytest.approx(before[name], rel=1e-5)


def test_precision_of_the_hypergradient(monkeypatch: pytest.MonkeyPatch) -> None:
    def hypergradient(**fields: Any) -> Hypergradient:
        mask = build({f"hypergradient.{name}": value for name, value in fields.items()}).levels.mask
        assert mask is not None
        return mask.hypergradient

    assert hypergradient().full_precision
    assert not hypergradient(precision="engine").full_precision
    monkeypatch.setattr(TorchEngine, "autocast", lambda _: torch.autocast("cpu", torch.bfloat16))
    assert (hypergradient().estimator, hypergradient().full_precision) == ("jvp", False)
    assert hypergradient(estimator="fd").full_precision
    with pytest.raises(UserError, match=r"^hypergradient\.estimator: fd-forward reuses .*under autocast"):
        hypergradient(estimator="fd-forward", precision="float32")


def test_every_spares_hypergradients_but_no_step_of_the_head(tmp_path: Path) -> None:
    rows = observe(tmp_path / "run", {"hypergradient.every": 3, "iterations": 7})["training"]
    assert ["loss/mask" in row for row in rows] == [True, False, False, True, False, False, True]
    assert all("loss/head" in row and "loss/pretrain" in row for row in rows)


def test_share_takes_the_influence_of_the_first_images() -> None:
    trainer = build({"hypergradient.share": 0.3})
    seen: list[int] = []
    autoencoder = trainer.levels.pretrain.autoencoder
    autoencoder.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    trainer.iterate(0)
    # Two pretrain steps on the whole batch of 8; 0.3 of it is rounded up.
    assert seen[:2] == [8, 8] and set(seen[2:]) == {3}


def test_damping_changes_the_implicit_response(tmp_path: Path) -> None:
    runs = [
        observe(
            tmp_path / str(damping),
            {"hypergradient.best_response": "implicit", "hypergradient.damping": damping},
        )["training"]
        for damping in (1e-2, 1.0)
    ]
    assert any(differ(*rows) for rows in zip(*runs, strict=True))


def test_dataset_and_path_choose_the_images(fill_images: Callable[..., Path]) -> None:
    folder, other = fill_images(mode="L"), fill_images(mode="L", first=500)
    digits = build({})
    seen = [digits.loaders.sample("train", 4).images]
    for path in (folder, other):
        trainer = build({"data.dataset": "folder", "data.path": path})
        seen.append(trainer.loaders.sample("train", 4).images)
        assert trainer.loaders.num_classes == 2 != digits.loaders.num_classes

    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


def test_download_fetches_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, Path]] = []
    monkeypatch.setattr(sources, "_download_cifar", lambda name, path: asked.append((name, path)))
    fields = {"data.dataset": "cifar10", "data.path": tmp_path, "model.in_chans": 3}
    for download in (False, True):
        with pytest.raises(UserError, match=r"^data\.path: no CIFAR-10 in "):
            build({**fields, "data.download": download})

    assert asked == [("cifar10", tmp_path)]  # once, and only where it was wanted


def test_evaluation_options_are_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "linear_accuracy", lambda *sets: 0.5)
    accuracy, batches = {}, {}
    for k, batch_size in ((1, 256), (300, 256), (1, 100)):
        trainer = build({"eval.knn_k": k, "eval.batch_size": batch_size})
        parts = evaluate.collect_features(evaluate.pixels, trainer.loaders, trainer.world)
        scores = evaluate.score_features(parts, "", trainer.config.eval.knn_k)
        accuracy[k, batch_size] = scores["knn_accuracy"]
        batches[batch_size] = [len(batch.images) for batch in trainer.loaders.evaluation("test")]

    assert accuracy[300, 256] < accuracy[1, 256] == accuracy[1, 100]
    assert max(batches[256]) == 256
    assert max(batches[100]) == 100
    assert sum(batches[256]) == sum(batches[100])


def test_pixels_are_scored_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluate, "linear_accuracy", lambda *sets: 0.5)
    keys = {}
    for wanted in (False, True):
        trainer = build({"run_dir": tmp_path, "eval.pixels": wanted})
        keys[wanted] = trainer.evaluate().keys()

    assert keys[True] - keys[False] == {"pixel_knn_accuracy", "pixel_linear_accuracy"}
    assert keys[False] >= {"knn_accuracy", "linear_accuracy"}


def build(fields: Fields) -> Trainer:
    """A trainer that has not started."""
    config = tiny_config(fields)
    return Trainer(config, RunDir(config.run_dir, config), join_world("cpu"), None)
