"""The DeepSpeed engine against the plain one: the same arithmetic, whatever is sharded.

DeepSpeed runs in processes of its own (it changes global state); each returns all that is asserted here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mlomae.distributed.deepspeed_engine import DeepSpeedEngine
from mlomae.distributed.ds_config import load_ds_config
from mlomae.distributed.engine import Engine, TorchEngine, state_shapes
from mlomae.distributed.env import World, join_world, leave_world
from mlomae.errors import UserError
from mlomae.sections import LevelConfig
from tests.distributed.problem import HALF, STEPS, batches, fresh_model, rate, run_engine
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.dist

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
STAGES = (0, 1, 2, 3)
# Under ZeRO 3 nothing stays gathered, and there are several groups.
SHARDED = {"stage3_param_persistence_threshold": 0, "sub_group_size": 20}
RATES = {
    "unclipped": LevelConfig(batch_size=6, lr=0.05, weight_decay=0.3, warmup=0.25, clip=0.0),
    "clipped": LevelConfig(batch_size=6, lr=0.05, weight_decay=0.3, warmup=0.25, eps=1e-3, clip=0.05),
}
State = dict[str, Tensor]
Results = dict[Any, Any]


def ds_engine(stage: int, rates: LevelConfig, world: World, micro_batches: int = 1) -> DeepSpeedEngine:
    section = {"stage": stage, **(SHARDED if stage == 3 else {})}
    return DeepSpeedEngine(fresh_model(), rates, {"zero_optimization": section}, world, micro_batches)


def _train_everywhere() -> Results:
    world = join_world("cpu", always_group=True)
    results: Results = {}
    for label, rates in RATES.items():
        start = TorchEngine(fresh_model(), rates).snapshot()
        middle, _ = _halves(TorchEngine(fresh_model(), rates), rates)
        for stage in STAGES:
            engine = ds_engine(stage, rates, world)
            norm_before = engine.grad_norm
            losses = run_engine(engine, rates)
            results[label, stage] = {
                "losses": losses,
                "state": engine.snapshot(),
                "norms": (norm_before, float(engine.grad_norm or 0)),
                "moved": _continue_from(middle, ds_engine(stage, rates, world), rates),
                "rewound": _continue_from(start, engine, rates, 0),
                "handed over": _halves(ds_engine(stage, rates, world), rates)[0],
            }
    for stage in STAGES:
        engine = ds_engine(stage, RATES["clipped"], world, micro_batches=3)
        results["micro-batches", stage] = _train_in_parts(engine), float(engine.grad_norm or 0)
    results["autocast"] = _train_in_bfloat16(world)
    results["bad config"] = _refusal(world)
    return results


def _halves(engine: Engine, rates: LevelConfig) -> tuple[State, State]:
    run_engine(engine, rates, 0, HALF)
    middle = engine.snapshot()
    run_engine(engine, rates, HALF, STEPS - HALF)
    return middle, engine.snapshot()


def _train_in_parts(engine: Engine) -> State:
    """Every batch as three micro-batches."""
    rates = RATES["clipped"]
    for step, (x, y) in enumerate(batches()):
        *parts, last = zip(x.split(2), y.split(2), strict=True)
        for part, labels in parts:
            engine.accumulate(4 * F.cross_entropy(engine(part), labels))
        engine.descend(4 * F.cross_entropy(engine(last[0]), last[1]), rate(step, rates))
    return engine.snapshot()


def _continue_from(state: State, engine: Engine, rates: LevelConfig, step: int = HALF) -> Results:
    """Loads a state, reads it back, and trains on."""
    engine.load_state_dict(state)
    loaded = engine.snapshot()
    losses = run_engine(engine, rates, step, STEPS - step)
    return {"loaded": loaded, "losses": losses, "state": engine.snapshot()}


def _train_in_bfloat16(world: World) -> Results:
    rates = RATES["unclipped"]
    config = load_ds_config(DS_CONFIGS / "zero2_bf16.json")
    engine = DeepSpeedEngine(fresh_model(), rates, config, world)
    x, _ = next(batches())
    with engine.autocast():
        inside = engine.module(x).dtype
    return {
        "passes": (engine(x).dtype, inside, engine.module(x).dtype),
        "losses": run_engine(engine, rates),
        "state": engine.snapshot(),
    }


def _refusal(world: World) -> str:
    with pytest.raises(UserError) as raised:
        DeepSpeedEngine(fresh_model(), RATES["clipped"], {"zero_optimization": {"stge": 1}}, world)
    return str(raised.value)


@pytest.fixture(scope="module")
def results() -> Results:
    (only,) = run_ranks(1, _train_everywhere)
    return only


@pytest.fixture(scope="module")
def expected() -> dict[str, tuple[list[float], State, State, float]]:
    """Per rates: losses, the states after half of the steps and after all, the last gradient norm."""
    references = {}
    for label, rates in RATES.items():
        engine = TorchEngine(fresh_model(), rates)
        middle, _ = _halves(engine, rates)
        losses = run_engine(TorchEngine(fresh_model(), rates), rates)
        references[label] = (losses, middle, engine.snapshot(), float(engine.grad_norm or 0))
    return references


def assert_states_close(actual: State, desired: State, bound: float) -> None:
    assert actual.keys() == desired.keys()
    for name, value in desired.items():
        torch.testing.assert_close(actual[name], value, rtol=bound, atol=bound)


@pytest.mark.parametrize("label", RATES)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_equals_the_plain_engine(
    stage: int, label: str, results: Results, expected: Results
) -> None:
    losses, _, state, norm = expected[label]
    result = results[label, stage]

    assert result["losses"] == pytest.approx(losses, rel=1e-6, abs=1e-6)
    assert_states_close(result["state"], state, 1e-6)
    assert {name: tuple(value.shape) for name, value in result["state"].items()} == state_shapes(
        fresh_model()
    )
    # Before the first step there is none; then it is the norm before clipping.
    assert result["norms"][0] is None
    assert result["norms"][1] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("stage", [*STAGES, None])
def test_micro_batches_take_the_steps_of_whole_batches(
    stage: int | None, results: Results, expected: Results
) -> None:
    _, _, state, norm = expected["clipped"]
    if stage is None:
        engine = TorchEngine(fresh_model(), RATES["clipped"], micro_batches=3)
        found = _train_in_parts(engine), float(engine.grad_norm or 0)
    else:
        found = results["micro-batches", stage]
    assert_states_close(found[0], state, 1e-5)
    assert found[1] == pytest.approx(norm, rel=1e-4)


def test_the_comparison_would_notice_a_clipping_that_was_not_asked_for(expected: Results) -> None:
    losses = {clip: _losses_clipped_at(clip) for clip in (0.0, 0.05, 1.0)}  # 1.0 is DeepSpeed's default

    assert losses[0.0] == expected["unclipped"][0]
    for clip in (0.05, 1.0):
        assert losses[clip] != pytest.approx(losses[0.0], abs=1e-4)


def _losses_clipped_at(clip: float) -> list[float]:
    rates = RATES["unclipped"].model_copy(update={"clip": clip})
    return run_engine(TorchEngine(fresh_model(), rates), rates)


@pytest.mark.parametrize("label", RATES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_state_moves_from_the_plain_engine_to_every_stage(
    stage: int, label: str, results: Results, expected: Results
) -> None:
    losses, middle, state, _ = expected[label]
    moved = results[label, stage]["moved"]

    for name, value in middle.items():
        assert torch.equal(moved["loaded"][name], value), name
    assert moved["losses"] == pytest.approx(losses[HALF:], rel=1e-6, abs=1e-6)
    assert_states_close(moved["state"], state, 1e-6)


@pytest.mark.parametrize("label", RATES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_state_from_before_the_first_step_replaces_a_later_one(
    stage: int, label: str, results: Results
) -> None:
    result = results[label, stage]

    assert result["rewound"]["losses"] == result["losses"]
    assert_states_close(result["rewound"]["state"], result["state"], 0.0)


@pytest.mark.parametrize("label", RATES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_state_moves_from_every_stage_to_the_plain_engine(
    stage: int, label: str, results: Results, expected: Results
) -> None:
    losses, middle, state, _ = expected[label]
    handed_over = results[label, stage]["handed over"]

    assert_states_close(handed_over, middle, 1e-6)
    onward = _continue_from(handed_over, TorchEngine(fresh_model(), RATES[label]), RATES[label])
    assert onward["losses"] == pytest.approx(losses[HALF:], rel=1e-6, abs=1e-6)
    assert_states_close(onward["state"], state, 1e-6)


def test_autocast_computes_in_bfloat16_and_keeps_float32_weights(results: Results, expected: Results) -> None:
    losses = expected["unclipped"][0]
    result = results["autocast"]

    # Through the engine, inside its context, and outside of both.
    assert result["passes"] == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert {value.dtype for value in result["state"].values()} == {torch.float32}
    assert result["losses"] != losses
    assert result["losses"] == pytest.approx(losses, rel=0.03)


def test_a_key_that_only_deepspeed_knows_to_be_wrong_gets_one_line(results: Results) -> None:
    message = results["bad config"]

    assert message.startswith("--deepspeed_config: refused by DeepSpeed (")
    assert "stge" in message
    assert "\n" not in message


def _two_runs() -> list[list[float]]:
    losses = []
    for _ in range(2):
        world = join_world("cpu", always_group=True)
        losses.append(run_engine(ds_engine(1, RATES["clipped"], world), RATES["clipped"]))
        leave_world()
    return losses


def test_a_process_can_run_deepspeed_twice() -> None:
    ((first, second),) = run_ranks(1, _two_runs)

    assert first == second
