"""Does pretraining pay? The same model with and without it, at equal epochs, over several seeds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from benchmarks.environment import ROOT
from benchmarks.report import Report, Row, Spread
from benchmarks.runs import train

pytestmark = pytest.mark.study

_TIMEOUT_S = 3600


@dataclass(frozen=True)
class Proof:
    """One data set: how the encoder is pretrained, what it is then used for, and which figure counts.

    Attributes:
        images: of pretraining, below the folder of the data set.
        pretrain: recipe and overrides.
        scratch: overrides of the evaluation's recipe for random weights. Each start has the learning rate
            that is best for it on validation images (docs/downstream.md).
        metric: of result.json, higher is better.
        gain: by which the pretrained encoder has to win.
    """

    option: str
    images: str
    pretrain: tuple[str, ...]
    task: str
    recipe: str
    scratch: tuple[str, ...]
    metric: str
    gain: float


PROOFS = {
    "cifar10": Proof(
        "cifar10", "", ("recipes/cifar10_micro.yaml", "--iterations", "1200", "--hypergradient.every", "4"),
        "finetune", "recipes/finetune/cifar10_micro.yaml", ("--optim.layer_decay", "1"), "accuracy", 0.05,
    ),
    "camvid": Proof(
        "camvid", "images/training", ("recipes/camvid_micro.yaml",),
        "segment", "recipes/segment/camvid.yaml", ("--optim.layer_decay", "1"), "miou", 0.0,
    ),
    "bccd": Proof(
        "bccd", "train", ("recipes/bccd_micro.yaml",),
        "detect", "recipes/detect/bccd.yaml", ("--optim.layer_decay", "1", "--optim.lr", "5e-4"), "ap", 0.0,
    ),
}  # fmt: skip


def _evaluate(proof: Proof, run: Path, data: Path, seed: str, *overrides: str) -> dict[str, Any]:
    """Result of ``mlomae eval``, in a process of its own; a finished evaluation is only read."""
    out = run / "eval" / f"{proof.task}{'-scratch' if '--scratch' in overrides else ''}-seed{seed}"
    command = [
        sys.executable, "-m", "mlomae", "eval", proof.task, str(run), "--config", proof.recipe,
        "--data.path", str(data), "--seed", seed, "--out", str(out), *overrides,
    ]  # fmt: skip
    settings = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True, timeout=_TIMEOUT_S)
    if done.returncode:
        pytest.fail(f"{' '.join(command[2:])} exited with {done.returncode}:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads((out / "result.json").read_text())
    return result


@pytest.mark.parametrize("name", list(PROOFS))
def test_downstream(
    request: pytest.FixtureRequest, report: Report, smoke: list[str], work_dir: Path, name: str
) -> None:
    proof, seeds = PROOFS[name], request.config.getoption("seeds")
    data = request.config.getoption(proof.option)
    if data is None:
        pytest.skip(f"needs --{proof.option} DIR")
    data = data.resolve()
    recipe, *overrides = proof.pretrain
    path = ("--data.path", str(data / proof.images))
    run = train(work_dir / name, *path, *overrides, *smoke, recipe=recipe)
    report.say(f"pretraining: {run.result['seconds']:.0f} s; {recipe} {' '.join(overrides)}")
    short = ("--optim.epochs", "1") if smoke else ()
    results: dict[str, list[dict[str, Any]]] = {"pretrained": [], "random weights": []}
    # In turns, so that a change in the machine's load does not favour one of them.
    for seed in seeds:
        for start, flags in (
            ("pretrained", ()),
            ("random weights", ("--scratch", "true", *proof.scratch)),
        ):
            result = _evaluate(proof, work_dir / name, data, seed, *flags, *short)
            report.say(f"{start}, seed {seed}: {proof.metric} {result[proof.metric]:.4f}")
            results[start].append(result)
    figures = (proof.metric, "seconds")
    rows: list[Row] = [
        {"encoder": start, **{figure: Spread.of([r[figure] for r in those]) for figure in figures}}
        for start, those in results.items()
    ]
    epochs = results["pretrained"][0]["epochs"]
    title = f"{proof.task} on {name}, {epochs} epochs of {proof.recipe}, mean ± standard deviation over seeds"
    report.table(f"{title} {', '.join(seeds)}; on the CPU", rows)
    means = [sum(r[proof.metric] for r in those) / len(those) for those in results.values()]
    report.say(f"gain: {means[0] - means[1]:+.4f} {proof.metric}")
    if not smoke:
        assert means[0] - means[1] > proof.gain, f"pretraining gains less than {proof.gain} {proof.metric}"
