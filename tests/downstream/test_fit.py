"""The training loop of evaluations: rates by layer, moving averages, and going on after a stop."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from mlomae.distributed.env import World
from mlomae.downstream.fit import Fit
from mlomae.downstream.optimizer import build_optimizer, layer_of, set_rates
from mlomae.downstream.sections import OptimConfig, TrainedTaskConfig
from mlomae.errors import Preempted, UserError
from mlomae.mlo.schedule import warmup_cosine
from mlomae.preemption import Preemption
from mlomae.progress import Show
from mlomae.random import stream_seed
from mlomae.run_dir import RunDir

DEPTH = 3
ONE = World(0, 1, torch.device("cpu"))


def vit(pool: str = "avg") -> VisionTransformer:
    return VisionTransformer(
        img_size=8, patch_size=4, embed_dim=16, depth=DEPTH, num_heads=2, num_classes=3, global_pool=pool
    )


def of_parameters(optimizer: torch.optim.Optimizer, field: str) -> dict[int, Any]:
    return {id(p): group[field] for group in optimizer.param_groups for p in group["params"]}


def test_rates_by_layer_are_those_of_timm() -> None:
    model = vit()
    config = OptimConfig(layer_decay=0.7, weight_decay=0.03)
    groups = param_groups_layer_decay(
        model, weight_decay=0.03, layer_decay=0.7, no_weight_decay_list=model.no_weight_decay()
    )
    expected = {
        id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]
    }

    optimizer = build_optimizer(model, "", config)
    scales, decays = of_parameters(optimizer, "lr_scale"), of_parameters(optimizer, "weight_decay")

    for name, parameter in model.named_parameters():
        found = scales[id(parameter)], decays[id(parameter)]
        assert found == pytest.approx(expected[id(parameter)]), name


def test_the_last_norm_moves_with_the_classifier() -> None:
    """As in MAE's fine-tuning; timm counts it to the last block where the class token is the feature."""
    assert layer_of("norm.weight", "", DEPTH) == layer_of("head.weight", "", DEPTH) == DEPTH + 1
    assert layer_of("encoder.blocks.2.norm1.bias", "encoder.", DEPTH) == DEPTH
    assert layer_of("neck.blocks.0.weight", "encoder.", DEPTH) == DEPTH + 1


def test_every_group_gets_its_share_of_the_rate() -> None:
    model = vit()
    optimizer = build_optimizer(model, "", OptimConfig(layer_decay=0.5))

    set_rates(optimizer, 0.8)

    rates = of_parameters(optimizer, "lr")
    assert rates[id(model.head.weight)] == 0.8
    assert rates[id(model.blocks[2].mlp.fc1.weight)] == 0.4
    assert rates[id(model.blocks[0].mlp.fc1.bias)] == 0.1
    assert rates[id(model.patch_embed.proj.weight)] == rates[id(model.pos_embed)] == 0.05


class Points:
    """A task: points of two classes, told apart by a small network with dropout."""

    encoder_prefix = "0."
    steps_per_epoch = 4
    digest = "points"
    show: Show = MappingProxyType({"loss": {"loss": "loss {:.4f}".format}})

    def __init__(
        self, kill_at: int | None = None, stop_at: int | None = None, bad_at: int | None = None
    ) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.model: nn.Module = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.3), nn.Linear(8, 2))
        self.number = 0
        self.kill_at, self.stop_at, self.bad_at = kill_at, stop_at, bad_at
        self.weights: list[Tensor] = []
        self.closed = False

    def batches(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        self.number = first
        while True:
            generator = torch.Generator().manual_seed(stream_seed(0, "points", self.number))
            points = torch.randn(8, 4, generator=generator)
            yield points, (points.sum(1) > 0).long()
            self.number += 1

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        self.weights.append(model[0].weight.detach().clone())  # type: ignore[index, union-attr, operator]
        if self.number == self.kill_at:
            raise KeyboardInterrupt
        if self.number == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        loss = nn.functional.cross_entropy(model(batch[0]), batch[1])
        return loss * (torch.nan if self.number == self.bad_at else 1), {"one": torch.ones(())}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        assert not model.training
        points, labels = next(self.batches(1000))
        return {"accuracy": float((model(points).argmax(1) == labels).float().mean())}

    def draw(self, model: nn.Module, path: Path) -> None:
        path.write_bytes(b"drawn")

    def close(self) -> None:
        self.closed = True


OPTIM = {"epochs": 3, "batch_size": 8, "lr": 0.05, "ema": 0.8, "clip": 1.0, "warmup": 0.2}


def fit(folder: Path, task: Points, **fields: Any) -> dict[str, Any]:
    """Trains in a folder, as the command does; leaves it for the next attempt."""
    optim = OptimConfig.model_validate({**OPTIM, **fields.pop("optim", {})})
    config = TrainedTaskConfig(optim=optim, device="cpu", log_every=3, **fields)
    run_dir = RunDir(folder, config)
    run_dir.claim(primary=True)
    try:
        with Preemption() as preemption:
            return Fit(task, config, run_dir, ONE, preemption).run()
    finally:
        run_dir.release()


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "checkpoint.safetensors") | {
        f"result.{name}": value for name, value in load_file(folder / "model.safetensors").items()
    }


def assert_equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.fixture
def undisturbed(tmp_path: Path) -> Path:
    fit(tmp_path / "whole", Points())
    return tmp_path / "whole"


def test_a_whole_run(undisturbed: Path) -> None:
    rows = [json.loads(line) for line in (undisturbed / "metrics.jsonl").read_text().splitlines()]

    assert [row["step"] for row in rows] == [3, 4, 6, 8, 9, 12]  # every third, and with every checkpoint
    assert [row["one"] for row in rows] == [1.0] * 6  # means over the steps since the last line
    assert rows[0]["epoch"] == 0.75
    assert rows[-1]["lr"] == pytest.approx(1e-6)
    assert rows[0]["lr"] == pytest.approx(warmup_cosine(2, 12, 0.05, 1e-6, 0.2))
    assert (undisturbed / "predictions.png").read_bytes() == b"drawn"


@pytest.mark.parametrize("step", [2, 6, 9])
def test_a_killed_run_ends_like_an_undisturbed_one(undisturbed: Path, tmp_path: Path, step: int) -> None:
    task = Points(kill_at=step)
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "killed", task)
    assert task.closed
    again = Points()

    fit(tmp_path / "killed", again)

    assert len(again.weights) == 12 - step // 4 * 4  # steps since the last epoch's end are taken again
    assert steps(tmp_path / "killed") == steps(undisturbed)
    assert_equal(weights(tmp_path / "killed"), weights(undisturbed))


def test_other_images_do_not_go_on_with_a_training(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, Points(kill_at=6))
    others = Points()
    others.digest = "others"
    with pytest.raises(UserError, match=r"^data\.path: holds other training images or classes"):
        fit(tmp_path, others)
    assert not others.weights


def test_broken_weights_are_not_saved(tmp_path: Path) -> None:
    class Breaking(Points):
        def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
            found = super().loss(model, batch)
            if self.number == 7:  # after whose step a checkpoint is due
                with torch.no_grad():
                    next(model.parameters()).fill_(torch.inf)
            return found

    with pytest.raises(UserError, match=r"^optim\.lr: the weights are no longer finite .* up to 8;"):
        fit(tmp_path, Breaking())
    saved = load_file(tmp_path / "checkpoint.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("step", [0, 5, 11])
def test_a_signal_is_obeyed_after_the_step(undisturbed: Path, tmp_path: Path, step: int) -> None:
    with pytest.raises(Preempted, match=f"SIGTERM after step {step + 1}"):
        fit(tmp_path / "stopped", Points(stop_at=step))
    again = Points()

    fit(tmp_path / "stopped", again)

    assert len(again.weights) == 11 - step
    assert_equal(weights(tmp_path / "stopped"), weights(undisturbed))


def test_the_moving_average_is_that_of_timm(tmp_path: Path) -> None:
    """Which begins with the weights after the first step; and it is what gets scored and saved."""
    task = Points()
    fit(tmp_path, task)
    _, *after = [*task.weights, task.model[0].weight.detach()]  # type: ignore[index]
    average = after[0]
    for weight in after[1:]:
        average = 0.8 * average + 0.2 * weight

    torch.testing.assert_close(load_file(tmp_path / "model.safetensors")["0.weight"], average)


def test_a_loss_that_is_not_finite_ends_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"optim.lr: the loss is nan in the steps up to 6") as caught:
        fit(tmp_path, Points(bad_at=5))

    assert "\n" not in str(caught.value)
    assert load_file(tmp_path / "checkpoint.safetensors")["model.0.weight"].isfinite().all()


def test_a_damaged_checkpoint_is_named(undisturbed: Path) -> None:
    (undisturbed / "checkpoint.safetensors").write_bytes(b"x" * 100)

    with pytest.raises(UserError, match=r"checkpoint\.safetensors: cannot be read"):
        fit(undisturbed, Points())
