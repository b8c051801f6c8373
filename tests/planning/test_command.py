"""``mlomae plan``: its numbers, its errors, its exit codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mlomae.cli import main
from mlomae.config import load_config
from mlomae.distributed.ds_config import load_ds_config
from mlomae.flops import iteration_flops
from mlomae.planning.sharding import read_sharding, shipped

ROOT = Path(__file__).resolve().parents[2]
BASE = ["plan", "--model", "vit_base_patch16"]
P_VIT_B = 111_654_400


def plan(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    main([*BASE, "--json", *words])
    return json.loads(capsys.readouterr().out)


def by_what(result: Any, part: str) -> dict[str, float]:
    return {t["what"]: t["total"] for t in result["communication"]["transfers"] if t["part"] == part}


@pytest.mark.parametrize("stage", ["0", "1", "2", "3"])
def test_a_pretrain_step_sends_what_its_stage_sends(capsys: pytest.CaptureFixture[str], stage: str) -> None:
    words = ["--gpus", "8", "--zero", stage, "--compute.precision", "float32", "--masking.policy", "random"]
    sent = by_what(plan(capsys, *words), "pretrain")
    # Two steps. To gather or to scatter, each rank sends 7 of 8 parts.
    unit = 2 * 4 * P_VIT_B * 7 / 8
    # ZeRO 3 gathers its weights for the forward pass and again for the backward pass.
    assert sum(sent.values()) == pytest.approx((3 if stage == "3" else 2) * unit, rel=0.01)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_stage_alone_stands_for_the_configuration_that_is_shipped(stage: int) -> None:
    there = load_ds_config(ROOT / "ds_configs" / f"zero{stage}.json")
    assert read_sharding(shipped(stage), 8, bf16=False) == read_sharding(there, 8, bf16=False)


def test_shards_shrink_with_the_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    rows = plan(capsys, "--gpus", "8,64", "--zero", "2")
    first, second = (row["memory"]["phases"][0]["parts"] for row in rows)
    assert first["optimizer"] == pytest.approx(8 * second["optimizer"], rel=1e-4)
    assert first["weights"] == second["weights"]
    assert rows[0]["batch"] == rows[1]["batch"]


def test_time_is_a_bound_without_a_measurement(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert plan(capsys)["time"] is None
    bound = plan(capsys, "--device", "H100")["time"]
    config = load_config(None, {"model.arch": "vit_base"})
    flops = sum(iteration_flops(config, 1000, "jvp").values())
    assert not bound["measured"]
    assert bound["seconds_compute"] == pytest.approx(flops / 989.4e12)
    profile = tmp_path / "profile.json"
    profile.write_text(json.dumps({"device": "H100", "figures": {"flops_per_second": 1e14}}))
    measured = plan(capsys, "--measured", str(profile))["time"]
    assert measured["measured"] and measured["seconds_compute"] == pytest.approx(flops / 1e14)


def test_a_record_of_the_gpu_benchmark_is_a_measurement(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    steps = [
        {"model": "m", "batch": 1, "variant": name, "step, ms": ms} for name, ms in (("a", 20), ("b", 10))
    ]
    tables = {"work": {"rows": [{"TFLOP/step": 2.0}]}, "steps": {"rows": steps}}
    record = tmp_path / "gpu.json"
    record.write_text(json.dumps({"parts": {"step": {"tables": tables}, "other": {"tables": {}}}}))
    assert plan(capsys, "--measured", str(record))["time"]["flops_per_second"] == pytest.approx(2e14)


def test_the_largest_batch_fits_and_the_next_one_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    images = plan(capsys, "--gpu-memory", "16")["largest_batch"][0]["images"]
    assert images > 0
    assert main([*BASE, "--gpu-memory", "16", "--batch", str(images)]) == 0
    assert main([*BASE, "--gpu-memory", "16", "--batch", str(images + 1)]) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["plan"], "plan: give --model NAME or --config FILE"),
        (["plan", "--model", "resnet50"], "--model: found 'resnet50', expected one of vit_pico_patchN"),
        ([*BASE, "--gpus", "7"], "pretrain.batch_size: 256 is not divisible by 7 ranks"),
        ([*BASE, "--device", "abacus"], "--device: found 'abacus', of which no peak in bf16 is known"),
        ([*BASE, "--gpu-memory", "0"], "--gpu-memory: found '0', expected a number above 0"),
        ([*BASE, "--measured", "nowhere.json"], "--measured nowhere.json: cannot be read"),
        ([*BASE, "--hypergradient.estimator", "exact"], "hypergradient.estimator: exact"),
    ],
)
def test_misuse_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
