"""The controls that learn something else than a mask for the task: hard masks, and a loss on labels."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch._dynamo.utils import counters

from mlomae import checkpoint
from mlomae.cli import main
from mlomae.distributed.ds_config import load_ds_config
from mlomae.distributed.env import World, join_world
from mlomae.hypergradient import MaskedBatch
from mlomae.meters import Scalars
from mlomae.run_dir import RunDir
from mlomae.trainer import Trainer
from tests.distributed.ranks import run_ranks
from tests.integration.tiny import Fields, TrainOnly, read_metrics, tiny_config, train, without_pictures

HARD = {"masking.policy": "hard"}
LABELS = {"masking.policy": "random", "pretrain.label_weight": 0.5}
BOTH = {**HARD, **LABELS, "masking.policy": "hard"}
DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"


def build(fields: Fields, world: World | None = None, ds_config: dict[str, Any] | None = None) -> Trainer:
    config = tiny_config(fields)
    return Trainer(config, RunDir(config.run_dir, config), world or join_world("cpu"), ds_config)


def curve(trainer: Trainer, iterations: int) -> list[dict[str, float]]:
    rows = []
    for iteration in range(iterations):
        trainer.iterate(iteration)
        rows.append(Scalars(trainer.meters.take()).read())
    return rows


def mean(rows: list[dict[str, float]], name: str) -> float:
    return sum(row[name] for row in rows) / len(rows)


def test_the_network_learns_to_rank_what_can_be_ranked() -> None:
    trainer = build({**HARD, "mask.lr": 1e-2, "iterations": 100})
    level, masked = trainer.levels.hardness, trainer.iterate(0)
    assert level is not None and masked.tokens is not None
    # As hard as a patch is bright.
    patches = masked.images.unfold(2, 2, 2).unfold(3, 2, 2).mean(dim=(1, 4, 5)).flatten(1)
    known = replace(masked, errors=patches)
    losses = [float(level.step(known, iteration)["loss/hardness"]) for iteration in range(100)]
    assert losses[0] > 0.9 * math.log(2)
    assert losses[-1] < 0.6 * math.log(2)


def test_the_network_learns_without_labels_which_patches_reconstruct_badly() -> None:
    digits = {"iterations": 60, "pretrain.batch_size": 64, "mask.lr": 3e-3, "mask.warmup": 0.0}
    rows = curve(build({**HARD, **digits}), 60)
    assert mean(rows[-10:], "loss/hardness") < math.log(2) - 0.01 < rows[0]["loss/hardness"]
    # The scores are no weights of the loss.
    assert all(row["loss/pretrain"] == row["loss/reconstruction"] for row in rows)
    losses = {"loss/pretrain", "loss/reconstruction", "loss/hardness"}
    assert rows[0].keys() == losses | {"gradient_norm/pretrain", "gradient_norm/hardness"}


def test_the_hardest_patches_are_removed_more_often_at_the_end() -> None:
    trainer = build({**HARD, "iterations": 20, "masking.hard_share": 1.0})
    assert trainer.levels.pretrain.policy.num_steps == 40

    def removed_share(masked: MaskedBatch) -> float:
        """Of the half with the highest scores."""
        assert masked.scores is not None
        hardest = masked.scores.argsort(dim=1, descending=True)[:, :8]
        return float(masked.selection.mask.gather(1, hardest).mean())

    shares = [removed_share(trainer.iterate(iteration)) for iteration in range(20)]
    assert 0.4 < shares[0] < 0.65 and shares[-1] == 1.0
    assert shares[5] < shares[12] < shares[19]


def test_hard_share_changes_the_masks() -> None:
    rows = [curve(build({**HARD, "masking.hard_share": share}), 4) for share in (0.5, 0.9)]
    assert rows[0][0]["loss/pretrain"] == rows[1][0]["loss/pretrain"]  # all are random at first
    assert rows[0][3]["loss/pretrain"] != rows[1][3]["loss/pretrain"]


def test_pictures_report_and_visualize_show_hard_masks(tmp_path: Path) -> None:
    run = tmp_path / "run"
    train(tiny_config({**BOTH, "run_dir": run, "picture_every": 2}))
    shutil.copyfile(run / "mask.png", tmp_path / "own.png")
    assert main(["visualize", str(run), str(tmp_path / "own.png"), "--out", str(tmp_path / "v.png")]) == 0
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text()
    for shown in ("Hardness loss", "Label accuracy", "a hard mask has no hypergradient", "without noise"):
        assert shown in page
    assert "No film of" not in page


class Interrupted(TrainOnly):
    """Stops between two checkpoints."""

    def iterate(self, iteration: int) -> MaskedBatch:
        if iteration == 3:
            raise KeyboardInterrupt
        return super().iterate(iteration)


@pytest.mark.parametrize("fields", [HARD, LABELS], ids=["hard", "labels"])
def test_a_resumed_run_is_the_uninterrupted_one(
    fields: Fields, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pictures(monkeypatch)
    configs = [tiny_config({**fields, "run_dir": tmp_path / name}) for name in ("whole", "resumed")]
    train(configs[0])
    with pytest.raises(KeyboardInterrupt):
        train(configs[1], kind=Interrupted)
    train(configs[1])

    assert read_metrics(tmp_path / "whole") == read_metrics(tmp_path / "resumed")
    whole, resumed = (
        checkpoint.read(config.run_dir / "checkpoints" / "step-00000004").tensors for config in configs
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    own = "hardness.exp_avg." if fields is HARD else "pretrain.exp_avg.classifier."
    assert any(name.startswith(own) for name in whole)


def test_labels_are_learned_from_the_kept_patches() -> None:
    fields = {"iterations": 100, "pretrain.batch_size": 64, "pretrain.lr": 3e-3}
    rows = curve(build({**LABELS, **fields}), 100)
    assert rows[0]["loss/label"] == pytest.approx(math.log(10), abs=0.2)
    assert mean(rows[-10:], "loss/label") < 0.9 * math.log(10)
    assert mean(rows[-10:], "accuracy/label") > 0.25
    for row in rows:
        whole = row["loss/reconstruction"] + 0.5 * row["loss/label"]
        assert row["loss/pretrain"] == pytest.approx(whole, rel=1e-5)


def test_the_label_loss_reaches_the_encoder_and_not_the_decoder() -> None:
    autoencoder = build(LABELS).levels.pretrain.autoencoder
    masked = build(LABELS).levels.pretrain.mask(build(LABELS).levels.pretrain.next_batch())
    errors, logits = autoencoder(masked.images, masked.selection, True)
    assert torch.equal(errors, autoencoder(masked.images, masked.selection))
    # Nothing that was removed is seen.
    pixels = masked.selection.mask.unflatten(1, (4, 4)).repeat_interleave(2, 1).repeat_interleave(2, 2)
    blank = masked.images * (1 - pixels[:, None])
    torch.testing.assert_close(autoencoder(blank, masked.selection, True)[1], logits)

    logits[:, 0].sum().backward()
    reached = {name.split(".")[0] for name, p in autoencoder.named_parameters() if p.grad is not None}
    assert reached == {"encoder", "classifier"}
    assert all(p.grad is not None for p in autoencoder.encoder.parameters() if p.requires_grad)


def test_the_classifier_changes_no_other_weight_and_stays_out_of_encoders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pictures(monkeypatch)
    states = [build(fields).levels.pretrain.autoencoder.state_dict() for fields in (LABELS, {})]
    own = states[0].keys() - states[1].keys()
    assert own == {"classifier.linear.weight", "classifier.linear.bias"}
    assert all(torch.equal(states[0][name], value) for name, value in states[1].items())

    run = tmp_path / "run"
    trained = train(tiny_config({**LABELS, "run_dir": run})).levels.pretrain.autoencoder
    assert load_file(run / "encoder.safetensors").keys() == trained.encoder.state_dict().keys()
    # A later run starts from encoder and decoder; its classifier is new, and need not be there.
    for fields in (LABELS, HARD):
        started = build({**fields, "model.weights": str(run)}).levels.pretrain.autoencoder.state_dict()
        for name, value in started.items():
            same = torch.equal(value, trained.state_dict()[name])
            assert same == (not name.startswith("classifier.")), name


@pytest.mark.parametrize("precondition", ["none", "adam"])
def test_learned_masks_with_labels_take_the_influence_of_the_errors_only(precondition: str) -> None:
    """Where labels weigh next to nothing the mask learns what it learns without them."""
    fields = {"hypergradient.precondition": precondition, "hypergradient.estimator": "exact"}
    plain, with_labels = (
        curve(build({**fields, "pretrain.label_weight": weight}), 2) for weight in (0.0, 1e-12)
    )
    for row, other in zip(plain, with_labels, strict=True):
        assert other.keys() - row.keys() == {"loss/label", "accuracy/label"}
        assert {name: other[name] for name in row} == pytest.approx(row, rel=1e-3)
    heavy = curve(build({**fields, "pretrain.label_weight": 1.0}), 2)
    assert heavy[1]["hypergradient/norm"] > 0


def test_micro_batches_take_the_step_of_the_whole_batch() -> None:
    whole, parts = (curve(build({**BOTH, "pretrain.micro_batches": n}), 3) for n in (1, 4))
    for row, other in zip(whole, parts, strict=True):
        assert other == pytest.approx(row, rel=1e-4)


@pytest.mark.slow
def test_compiled_modules_compute_the_same_without_breaks() -> None:
    torch._dynamo.reset()
    counters.clear()
    fields = {**BOTH, "pretrain.label_weight": 0.5}
    eager, compiled = (curve(build({**fields, "compute.execution": how}), 3) for how in ("eager", "graphs"))
    for row, other in zip(eager, compiled, strict=True):
        assert other == pytest.approx(row, rel=1e-3)
    assert not counters["graph_break"]


def _everywhere() -> dict[str, list[dict[str, float]]]:
    world = join_world("cpu", always_group=True)
    found = {}
    for name in ("plain", "zero2", "zero3"):
        ds_config = None if name == "plain" else load_ds_config(DS_CONFIGS / f"{name}.json")
        found[name] = curve(build({**BOTH, "pretrain.batch_size": 16}, world, ds_config), 4)
    return found


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_and_shards_compute_what_one_rank_does() -> None:
    expected = curve(build({**BOTH, "pretrain.batch_size": 16}), 4)
    first, second = run_ranks(2, _everywhere)
    assert first == second  # averaged over the ranks
    for rows in first.values():
        for row, other in zip(rows, expected, strict=True):
            assert row == pytest.approx(other, rel=1e-4)
