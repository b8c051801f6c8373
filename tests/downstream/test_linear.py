"""The linear probe: heads in one pass are as many probes; what is tested takes no part in the choice."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm.optim
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn import functional

from mlomae.cli import main
from mlomae.data.batches import permutation
from mlomae.downstream import linear, probe
from mlomae.downstream.feature_set import FeatureSet
from mlomae.downstream.probe import INIT_STD, Heads, ProbePlan, Scores, best_head
from mlomae.mlo.schedule import warmup_cosine
from mlomae.random import stream_seed
from tests.downstream.test_knn import clouds, read_features
from tests.integration.tiny import read_metrics, read_result

CLASSES, WIDTH = 5, 8
LRS = (1e-3, 3e-2, 0.5)


def train(plan: ProbePlan, part: FeatureSet, rates: tuple[float, ...] = LRS) -> Heads:
    heads = Heads(rates, part.features, part.labels, CLASSES, plan)
    for epoch in range(plan.epochs):
        heads.train_epoch(epoch)
    return heads


@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_heads_are_probes_of_their_own(optimizer: Any, weight_decay: float) -> None:
    plan = ProbePlan(optimizer, epochs=5, batch_size=64, weight_decay=weight_decay)
    part, other = clouds(150, 0), clouds(90, 1)
    together = train(plan, part)
    scores = together.score(other.features, other.labels)
    for number, rate in enumerate(LRS):
        alone = train(plan, part, (rate,))
        torch.testing.assert_close(together.weight[number], alone.weight[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(together.bias[number], alone.bias[0], rtol=1e-5, atol=1e-6)
        expected = alone.score(other.features, other.labels)
        assert scores.loss[number] == pytest.approx(float(expected.loss), rel=1e-5)
        assert scores.accuracy[number] == expected.accuracy


def by_autograd(plan: ProbePlan, part: FeatureSet, rate: float) -> nn.Linear:
    """One probe as one would write it: BatchNorm with the set's statistics, torch's or timm's optimizer."""
    layer = nn.Linear(WIDTH, CLASSES)
    generator = torch.Generator().manual_seed(stream_seed(plan.seed, "probe"))
    with torch.no_grad():
        layer.weight.copy_(torch.randn(CLASSES, WIDTH, generator=generator) * INIT_STD)
        layer.bias.zero_()
    norm = nn.BatchNorm1d(WIDTH, affine=False, eps=1e-30)
    norm.running_mean, norm.running_var = part.features.mean(0), part.features.var(0, unbiased=False)
    norm.eval()
    groups = [
        {"params": [layer.weight], "weight_decay": plan.weight_decay, "always_adapt": True},
        {"params": [layer.bias], "weight_decay": 0.0, "always_adapt": False},
    ]
    optimizer: torch.optim.Optimizer
    if plan.optimizer == "lars":
        optimizer = timm.optim.Lars(groups, lr=rate, momentum=0.9, eps=0.0)
    else:
        optimizer = torch.optim.AdamW(groups, lr=rate)
    steps = -(-len(part) // plan.batch_size)
    for epoch in range(plan.epochs):
        order = permutation(len(part), stream_seed(plan.seed, "probe", epoch), part.labels.device)
        for number, rows in enumerate(order.tensor_split(steps)):
            factor = warmup_cosine(epoch * steps + number, plan.epochs * steps, 1.0, 0.0, plan.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate * factor
            features = norm(part.features[rows]) if plan.standardise else part.features[rows]
            loss = functional.cross_entropy(layer(features), part.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return layer


@pytest.mark.parametrize("standardise", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", ["adamw", "lars"])
def test_a_head_is_trained_as_by_autograd(
    optimizer: Any, weight_decay: float, standardise: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Chunks that do not divide a batch.
    monkeypatch.setattr(probe, "_MIN_ROWS", 7)
    monkeypatch.setitem(probe._CHUNK, "cpu", 1)
    plan = ProbePlan(optimizer, 4, 64, weight_decay=weight_decay, standardise=standardise, seed=3)
    part = clouds(150, 0)
    heads, layer = train(plan, part), by_autograd(plan, part, LRS[1])
    torch.testing.assert_close(heads.weight[1], layer.weight.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(heads.bias[1], layer.bias.detach(), rtol=1e-4, atol=1e-5)
    # The loss on the way is that of the images, not of the batches: they may differ in size.
    assert heads.train_epoch(0).shape == (3,)


def test_scores_are_those_of_the_definition() -> None:
    part, other = clouds(150, 0), clouds(90, 1)
    heads = train(ProbePlan(epochs=3), part)
    scores = heads.score(other.features, other.labels)
    for number in range(len(LRS)):
        standard = (other.features - part.features.mean(0)) / part.features.std(0, unbiased=False)
        logits = standard @ heads.weight[number].T + heads.bias[number]
        loss = functional.cross_entropy(logits, other.labels)
        assert scores.loss[number] == pytest.approx(float(loss), rel=1e-4)
        right = (logits.argmax(1) == other.labels).float().mean()
        assert scores.accuracy[number] == pytest.approx(float(right))
    assert torch.equal(scores.top5, torch.ones(3, dtype=torch.float64))  # of five classes


def test_long_training_finds_what_logistic_regression_finds() -> None:
    part, other = clouds(400, 0), clouds(400, 1)
    heads = train(ProbePlan(epochs=100, batch_size=100), part, (0.05,))
    scaler = StandardScaler().fit(part.features.numpy())
    exact = LogisticRegression(C=1e6, max_iter=1000).fit(
        scaler.transform(part.features.numpy()), part.labels.numpy()
    )
    expected = exact.score(scaler.transform(other.features.numpy()), other.labels.numpy())
    assert float(heads.score(other.features, other.labels).accuracy) == pytest.approx(expected, abs=0.015)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1000.1])
def test_a_feature_that_does_not_vary_is_left_out(constant: float) -> None:
    part, other = clouds(100, 0), clouds(50, 1)
    more = [torch.cat([one.features, torch.full((len(one), 1), constant)], 1) for one in (part, other)]
    heads = train(ProbePlan(epochs=3), FeatureSet(more[0], part.labels))
    before = heads.score(more[1], other.labels)
    more[1][:, -1] += 5
    after = heads.score(more[1], other.labels)
    assert torch.isfinite(after.loss).all() and torch.equal(after.loss, before.loss)


def test_the_unit_of_a_feature_does_not_matter() -> None:
    part, units = clouds(200, 0, spread=1.5), torch.logspace(-4, 4, WIDTH)
    scaled = FeatureSet(part.features * units, part.labels)
    plan = ProbePlan(epochs=5)
    found, expected = train(plan, scaled), train(plan, part)
    torch.testing.assert_close(found.weight, expected.weight, rtol=1e-3, atol=1e-4)


def test_the_best_head_has_the_lowest_finite_loss() -> None:
    def best(*losses: float) -> int | None:
        loss = torch.tensor(losses, dtype=torch.float64)
        return best_head(Scores(loss, loss, loss))

    nan, inf = float("nan"), float("inf")
    assert best(0.3, 0.2, nan, 0.4) == 1
    assert best(nan, inf, 0.4) == 2
    assert best(nan, inf) is None


def evaluate(run: Path, *words: str) -> int:
    return main(["eval", "linear", str(run), "--device", "cpu", *words])


@pytest.fixture
def run(colour_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(colour_run, tmp_path / "run")


def test_the_rate_is_chosen_on_the_heldout_images_and_tested_once(
    digits_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = shutil.copytree(digits_run, tmp_path / "run")
    scored: list[tuple[int, int]] = []
    score = Heads.score

    def recording(self: Heads, features: torch.Tensor, labels: torch.Tensor) -> Scores:
        scored.append((len(self.rates), len(labels)))
        return score(self, features, labels)

    monkeypatch.setattr(Heads, "score", recording)
    assert evaluate(run, "--epochs", "6", "--lrs", "[0.0001, 0.03, 50.0]", "--batch_size", "256") == 0

    result, parts = read_result(run / "eval" / "linear"), read_features(run / "eval")
    assert scored == [(3, len(parts["heldout"])), (1, len(parts["test"]))]
    assert result["lr"] == 0.03 == result["lrs"][int(np.argmin(result["heldout_losses"]))]
    assert result["heldout_accuracy"] == result["heldout_accuracies"][1] > result["heldout_accuracies"][0]
    assert "top5_accuracy" not in result  # of ten classes
    both = FeatureSet(
        torch.cat([parts["labelled"].features, parts["heldout"].features]),
        torch.cat([parts["labelled"].labels, parts["heldout"].labels]),
    )
    plan = ProbePlan(epochs=6, batch_size=256)
    again = Heads([0.03], both.features, both.labels, 10, plan)
    for epoch in range(6):
        again.train_epoch(epoch)
    assert result["accuracy"] == float(score(again, parts["test"].features, parts["test"].labels).accuracy)


@pytest.mark.parametrize(("optimizer", "epoch"), [("adamw", 3), ("lars", 5), ("adamw", 9), ("lars", 10)])
def test_a_probe_that_is_stopped_goes_on_where_it_was(
    optimizer: str, epoch: int, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--epochs", "5", "--optimizer", optimizer, "--log_every", "1", "--batch_size", "20"]
    assert evaluate(run, "--out", str(run / "eval" / "undisturbed"), *words) == 0
    expected = read_result(run / "eval" / "undisturbed")
    trained: list[int] = []
    train_epoch = Heads.train_epoch

    def interrupted(self: Heads, number: int) -> torch.Tensor:
        trained.append(number)
        if len(trained) == epoch:
            os.kill(os.getpid(), signal.SIGUSR1)
        return train_epoch(self, number)

    monkeypatch.setattr(Heads, "train_epoch", interrupted)
    assert evaluate(run, *words) == 75
    assert len(trained) == epoch
    assert evaluate(run, *words) == 0
    assert len(trained) == 10
    assert read_result(run / "eval" / "linear") == expected
    assert read_metrics(run / "eval" / "linear") == read_metrics(run / "eval" / "undisturbed")


def test_a_probe_that_is_killed_goes_on_at_its_last_save(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "SECONDS_BETWEEN_SAVES", 0.0)
    trained: list[int] = []
    train_epoch = Heads.train_epoch

    def dying(self: Heads, number: int) -> torch.Tensor:
        trained.append(number)
        if len(trained) == 8:
            raise KeyboardInterrupt
        return train_epoch(self, number)

    words = ["--epochs", "5", "--batch_size", "20"]
    with monkeypatch.context() as patch:
        patch.setattr(Heads, "train_epoch", dying)
        assert evaluate(run, *words) == 130
        assert evaluate(run, *words) == 0
    assert trained == [0, 1, 2, 3, 4, 0, 1, 2, 2, 3, 4]
    assert evaluate(run, "--out", str(run / "eval" / "undisturbed"), *words) == 0
    assert read_result(run / "eval" / "linear") == read_result(run / "eval" / "undisturbed")


def test_a_probe_begins_anew_on_other_images(
    run: Path, colour_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fewer = shutil.copytree(colour_folder, tmp_path / "fewer")
    (fewer / "train" / "red" / "00.png").unlink()
    words = ["--epochs", "5", "--batch_size", "20"]
    on_fewer = [*words, "--data.path", str(fewer)]
    train_epoch = Heads.train_epoch

    def interrupted(self: Heads, number: int) -> torch.Tensor:
        if number == 3:
            os.kill(os.getpid(), signal.SIGUSR1)
        return train_epoch(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Heads, "train_epoch", interrupted)
        assert evaluate(run, *words) == 75
    assert evaluate(run, *on_fewer) == 0
    assert evaluate(run, "--out", str(run / "eval" / "undisturbed"), *on_fewer) == 0
    assert read_result(run / "eval" / "linear") == read_result(run / "eval" / "undisturbed")


def test_rates_that_are_all_too_high_are_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--lrs", "[1.0e+38, 2.0e+38]", "--weight_decay", "10", "--epochs", "3"]
    assert evaluate(run, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mlomae: error: lrs: none of [1e+38, 2e+38] leads to finite numbers")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lrs", "[]"], "lrs: "),
        (["--lrs", "[0.1, -1]"], "lrs.1: "),
        (["--lrs", "0.1"], "lrs: "),
        (["--optimizer", "sgd"], "optimizer: "),
        (["--batch_size", "0"], "batch_size: "),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    words: list[str], message: str, digits_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(digits_run, *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mlomae: error: {message}")


@pytest.mark.parametrize("recipe", ["imagenet_vit_b16", "cifar10"])
def test_recipes_are_valid(recipe: str) -> None:
    from mlomae.config import load_tree

    root = Path(__file__).resolve().parents[2]
    config = load_tree(root / "recipes" / "linear" / f"{recipe}.yaml", {}, linear.Config)
    assert json.loads(config.model_dump_json())["lrs"] == sorted(config.lrs)
