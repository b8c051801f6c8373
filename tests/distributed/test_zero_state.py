"""States of every engine: whole, portable to every stage and number of ranks, and safe from bad steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlomae.distributed import collectives
from mlomae.distributed.deepspeed_engine import DeepSpeedEngine
from mlomae.distributed.ds_config import load_ds_config
from mlomae.distributed.engine import Engine, TorchEngine
from mlomae.distributed.env import World, join_world
from mlomae.sections import LevelConfig
from tests.distributed.problem import HALF, STEPS, batches, rate
from tests.distributed.ranks import run_ranks

pytestmark = pytest.mark.dist

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
SHIPPED = sorted(DS_CONFIGS.glob("*.json"))
RATES = LevelConfig(batch_size=6, lr=0.05, weight_decay=0.3, warmup=0.25, eps=1e-3, clip=0.5)
ON_HOST = {"device": "cpu"}
# Nothing stays gathered, and there are several groups.
SHARDED = {"stage": 3, "stage3_param_persistence_threshold": 0, "sub_group_size": 20}
KINDS: dict[str, dict[str, Any] | None] = {
    "torch": None,
    "zero 0": {"stage": 0},
    "zero 1": {"stage": 1},
    "zero 2": {"stage": 2},
    "zero 2, offloaded": {"stage": 2, "offload_optimizer": ON_HOST},
    "zero 3": SHARDED,
    "zero 3, offloaded": {**SHARDED, "offload_optimizer": ON_HOST, "offload_param": ON_HOST},
}
State = dict[str, Tensor]
Results = dict[Any, Any]


class Odd(nn.Module):
    """Sizes that two ranks cannot share evenly, a frozen parameter and buffers of both kinds."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.cls_token = nn.Parameter(torch.randn(1, 1, 5))
        self.pos_embed = nn.Parameter(torch.randn(1, 1, 5), requires_grad=False)
        self.register_buffer("shift", torch.randn(3))
        self.register_buffer("unsaved", torch.ones(3), persistent=False)
        self.out = nn.Linear(5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.linear(x) + self.cls_token[0] + self.pos_embed[0])
        return self.out(F.gelu(hidden)) * self.unsaved + self.shift


def blank_model() -> Odd:
    """Of other weights, so that loading has something to do."""
    model = Odd()
    with torch.no_grad():
        for value in model.state_dict().values():
            value.normal_()
    return model


def make(kind: str, model: nn.Module, world: World) -> Engine:
    section = KINDS[kind]
    if section is None:
        return TorchEngine(model, RATES)
    return DeepSpeedEngine(model, RATES, {"zero_optimization": section}, world)


def train(engine: Engine, world: World, first: int, count: int) -> None:
    rows = slice(world.rank * 6 // world.size, (world.rank + 1) * 6 // world.size)
    for step, (x, y) in enumerate(batches(first, count), start=first):
        engine.descend(4 * F.cross_entropy(engine(x[rows]), y[rows]), rate(step, RATES))


def _move(middle: State, start: State) -> Results:
    """Every kind: what it makes of two states, of its own, and of a gradient that is not finite."""
    world = join_world("cpu", always_group=True)
    results: Results = {}
    for kind in KINDS:
        engine = make(kind, blank_model(), world)
        engine.load_state_dict(middle)
        found: Results = {"loaded": engine.snapshot(), "shapes": engine.shapes()}
        train(engine, world, HALF, STEPS - HALF)
        found["continued"] = engine.snapshot()
        whole = engine.whole_module()
        found["whole"] = {name: value.clone() for name, value in whole.state_dict().items()}
        x = torch.ones(2, 4)
        with torch.no_grad():
            found["outputs"] = whole(x), engine.module(x)
        found["norm"] = float(engine.weight_norm())
        found["bad step"] = _bad_step(engine, world)
        engine.load_state_dict(start)
        found["start"] = engine.snapshot()
        train(engine, world, 0, HALF)
        own = engine.snapshot()
        # The other ranks hold nothing: they learn the state as from a file.
        own = collectives.broadcast_object(own)
        train(engine, world, HALF, STEPS - HALF)
        fresh = make(kind, blank_model(), world)
        fresh.load_state_dict(own)
        train(fresh, world, HALF, STEPS - HALF)
        found["straight"], found["interrupted"] = engine.snapshot(), fresh.snapshot()
        results[kind] = found
    return results


def _bad_step(engine: Engine, world: World) -> Results:
    """A gradient that is not finite, on the last rank alone."""
    before, skipped = engine.snapshot(), engine.skipped_steps
    x = torch.ones(2, 4) * (torch.inf if world.rank == world.size - 1 else 1.0)
    engine.descend(engine(x).sum(), 0.1)
    return {"before": before, "after": engine.snapshot(), "counted": engine.skipped_steps - skipped}


@pytest.fixture(scope="module")
def reference() -> dict[str, State]:
    world = join_world("cpu")
    engine = TorchEngine(Odd(), RATES)
    states = {"start": engine.snapshot()}
    train(engine, world, 0, HALF)
    states["middle"] = engine.snapshot()
    train(engine, world, HALF, STEPS - HALF)
    return {**states, "end": engine.snapshot()}


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest, reference: dict[str, State]) -> list[Results]:
    return run_ranks(request.param, _move, reference["middle"], reference["start"])


def assert_same(found: State, expected: State) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_is_restored_bit_for_bit(
    kind: str, ranks: list[Results], reference: dict[str, State]
) -> None:
    found = ranks[0][kind]

    assert_same(found["loaded"], reference["middle"])
    assert_same(found["start"], reference["start"])
    assert found["shapes"] == {name: tuple(value.shape) for name, value in reference["middle"].items()}
    # Rank 0 alone holds whole tensors.
    assert all(not other[kind]["loaded"] for other in ranks[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_training_goes_on_as_if_nothing_had_happened(
    kind: str, ranks: list[Results], reference: dict[str, State]
) -> None:
    found = ranks[0][kind]

    for name, value in reference["end"].items():
        torch.testing.assert_close(found["continued"][name], value, rtol=1e-5, atol=1e-5)
    assert_same(found["interrupted"], found["straight"])


@pytest.mark.parametrize("kind", KINDS)
def test_the_whole_module_is_the_module(kind: str, ranks: list[Results]) -> None:
    state = ranks[0][kind]["continued"]
    weights = {n.removeprefix("weight."): v for n, v in state.items() if n.startswith("weight.")}
    frozen = {"pos_embed", "shift"}
    norm = torch.stack([v.square().sum() for n, v in weights.items() if n not in frozen]).sum().sqrt()

    for rank in ranks:
        found = rank[kind]
        assert_same(found["whole"], weights)
        torch.testing.assert_close(*found["outputs"])
        assert found["norm"] == pytest.approx(float(norm), rel=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_a_gradient_that_is_not_finite_is_skipped_and_counted(
    kind: str, ranks: list[Results]
) -> None:
    assert [rank[kind]["bad step"]["counted"] for rank in ranks] == [1] * len(ranks)
    assert_same(ranks[0][kind]["bad step"]["after"], ranks[0][kind]["bad step"]["before"])


def _train_with_files(paths: list[Path]) -> Results:
    world = join_world("cpu", always_group=True)
    results = {}
    for path in paths:
        engine = DeepSpeedEngine(Odd(), RATES, load_ds_config(path), world)
        train(engine, world, 0, STEPS)
        results[path.name] = engine.snapshot()
    return results


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bf16"])
def test_every_shipped_file_trains(autocast: bool, reference: dict[str, State]) -> None:
    # Apart: DeepSpeed keeps autocast for a process.
    paths = [path for path in SHIPPED if ("torch_autocast" in json.loads(path.read_text())) is autocast]
    assert len(paths) >= 4
    results, _ = run_ranks(2, _train_with_files, paths)

    bound = 0.1 if autocast else 1e-5
    for name, state in results.items():
        for key, value in reference["end"].items():
            torch.testing.assert_close(state[key], value, rtol=bound, atol=bound, msg=f"{name}: {key}")
            assert state[key].dtype == torch.float32
