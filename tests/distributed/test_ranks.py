"""Two ranks compute what one computes at the same global batch, and agree with each other bit for bit."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlomae.config import Config
from mlomae.distributed.ds_config import load_ds_config
from mlomae.distributed.engine import Engine, TorchEngine
from mlomae.distributed.env import World, join_world
from mlomae.hypergradient import MaskedBatch
from mlomae.meters import Scalars
from mlomae.run_dir import RunDir
from mlomae.trainer import Trainer
from tests.distributed.ranks import run_ranks
from tests.integration.tiny import TrainOnly, read_metrics, tiny_config, train, without_pictures
from tests.mlo.problem import parameters_of

pytestmark = pytest.mark.dist

DS_CONFIGS = Path(__file__).resolve().parents[2] / "ds_configs"
ITERATIONS = 20
# Levels and the DeepSpeed configuration (none: plain engines).
CASES: dict[str, tuple[int, str | None]] = {
    "plain": (3, None),
    "plain, two levels": (2, None),
    "zero1": (3, "zero1.json"),
    "zero2": (3, "zero2.json"),
    "zero3": (3, "zero3.json"),
}
# Measured: 4e-7, from sums in another order.
LOSS_BOUND = 1e-5


def config_of(levels: int) -> Config:
    return tiny_config(
        {
            "iterations": ITERATIONS,
            "levels": levels,
            "masking.policy": "learned",
            "masking.selection": "gumbel",
            "masking.random_share": 0.3,
            "data.augment": "shift",
            "pretrain.batch_size": 16,
            "pretrain.clip": 0.5,
        }
    )


def _run_all_cases() -> dict[str, Any]:
    world = join_world("cpu", always_group=True)
    return {name: _run(world, *case) for name, case in CASES.items()}


def _run(world: World, levels: int, ds_name: str | None) -> dict[str, Any]:
    config = config_of(levels)
    ds_config = None if ds_name is None else load_ds_config(DS_CONFIGS / ds_name)
    trainer = Trainer(config, RunDir(config.run_dir, config), world, ds_config)
    curve = []
    for iteration in range(ITERATIONS):
        trainer.iterate(iteration)
        curve.append(Scalars(trainer.meters.take()).read())
    return {
        "curve": curve,
        "weights": {name: _weights(level.engine) for name, level in trainer.levels.by_name().items()},
        "state": {name: level.engine.snapshot() for name, level in trainer.levels.by_name().items()},
        "mask step": _mask_step(trainer),
    }


def _mask_step(trainer: Trainer) -> dict[str, Any]:
    """One more step of the mask level, taken apart."""
    levels = trainer.levels
    assert levels.mask is not None and levels.head is not None
    masked = levels.pretrain.mask(levels.pretrain.next_batch())
    train, heldout = levels.head.next_batch(), levels.mask.next_batch()
    before = _weights(levels.pretrain.engine)
    direction = levels.mask.hypergradient.direction(train, heldout, ITERATIONS - 2)
    influence, _ = levels.mask.hypergradient.influence(masked, direction)
    after = _weights(levels.pretrain.engine)
    space, gradients = levels.mask.hypergradient.space, list[Tensor]()
    v = direction.values
    engine = levels.mask.engine
    if isinstance(engine, TorchEngine):
        parameters = parameters_of(engine.module)
        engine.optimizer.register_step_pre_hook(
            lambda *_: gradients.extend(p.grad for p in parameters if p.grad is not None)
        )
    levels.mask.step(masked, direction, ITERATIONS - 2)
    return {
        "perturbed": {"before": before, "after": after},
        "direction": list(space.whole(v).values()) if space.has_whole_vectors else [space.norm(v)],
        "influence": influence,
        "gradients": gradients,
        "gradient norm": torch.as_tensor(levels.mask.engine.grad_norm),
        "weights": _weights(levels.mask.engine),
    }


def _weights(engine: Engine) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in engine.whole_module().state_dict().items()}


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    (result,) = run_ranks(1, _run_all_cases)
    return result


@pytest.fixture(scope="module")
def two() -> list[dict[str, Any]]:
    return run_ranks(2, _run_all_cases)


def assert_same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


def joined(tensors: Iterable[Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", CASES)
def test_losses_equal_those_of_one_rank(case: str, one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for level in ("pretrain", "head", "mask"):
        expected = [row[f"loss/{level}"] for row in one[case]["curve"]]
        found = [row[f"loss/{level}"] for row in two[0][case]["curve"]]
        assert found == pytest.approx(expected, abs=LOSS_BOUND, rel=0)
    assert len(expected) == ITERATIONS
    assert two[0][case]["curve"] == two[1][case]["curve"]  # what is logged is over all ranks


@pytest.mark.parametrize("case", CASES)
def test_every_rank_holds_the_same_bits(case: str, two: list[dict[str, Any]]) -> None:
    first, second = (result[case] for result in two)
    for level in ("pretrain", "head", "mask"):
        assert_same_bits(first["weights"][level], second["weights"][level])
        assert first["state"][level] and not second["state"][level]

    a, b = first["mask step"], second["mask step"]
    assert_same_bits(a["weights"], b["weights"])
    assert torch.equal(a["gradient norm"], b["gradient norm"])
    for kind in ("direction", "gradients"):
        assert all(torch.equal(x, y) for x, y in zip(a[kind], b[kind], strict=True))
    if CASES[case][1] is None:
        assert len(a["gradients"]) == len(a["weights"])
    # Each rank has images of its own: agreement is not for want of work to share.
    assert not torch.equal(a["influence"], b["influence"])


@pytest.mark.parametrize("case", CASES)
def test_the_direction_and_the_states_equal_those_of_one_rank(
    case: str, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    single, shared = one[case], two[0][case]
    v, w = (joined(result["mask step"]["direction"]) for result in (single, shared))
    assert relative_error(w, v) < 1e-5  # measured 3e-7
    influence = torch.cat([result[case]["mask step"]["influence"] for result in two])
    # Measured 2e-4: the finite difference divides rounding errors by its radius.
    assert relative_error(influence, single["mask step"]["influence"]) < 2e-3
    for level, state in single["state"].items():
        assert shared["state"][level].keys() == state.keys()
        assert float(shared["state"][level]["step"]) == float(state["step"])
    for level, weights in single["weights"].items():
        # All together: an attention key's bias has no gradient but rounding errors, which Adam scales up.
        assert relative_error(joined(shared["weights"][level].values()), joined(weights.values())) < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_perturbed_weights_come_back_bit_for_bit(
    case: str, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    for result in (one, *two):
        perturbed = result[case]["mask step"]["perturbed"]
        assert_same_bits(perturbed["before"], perturbed["after"])


def test_sharding_changes_nothing(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    for result in (one, two[0]):
        for stage in ("zero1", "zero2", "zero3"):
            for level in ("pretrain", "head", "mask"):
                expected = [row[f"loss/{level}"] for row in result["plain"]["curve"]]
                found = [row[f"loss/{level}"] for row in result[stage]["curve"]]
                assert found == pytest.approx(expected, abs=LOSS_BOUND, rel=0)


class _Stop(Exception):
    """Ends a run early."""


class _StopsEarly(TrainOnly):
    """Breaks off at an iteration after the second checkpoint."""

    def iterate(self, iteration: int) -> MaskedBatch:
        if iteration == 10:
            raise _Stop
        return super().iterate(iteration)


def _start_sharded(run_dir: Path, ds_name: str) -> int:
    world = join_world("cpu", always_group=True)
    config = config_of(3).model_copy(update={"run_dir": run_dir, "checkpoint_every": 4})
    directory = RunDir(run_dir, config)
    trainer = _StopsEarly(config, directory, world, load_ds_config(DS_CONFIGS / ds_name))
    directory.claim(primary=world.primary)
    with pytest.raises(_Stop):
        trainer.fit()
    return trainer.iteration


@pytest.mark.parametrize("ds_name", ["zero2.json", "zero3.json"])
def test_a_sharded_run_can_be_finished_by_one_plain_process(
    ds_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pictures(monkeypatch)
    assert run_ranks(2, _start_sharded, tmp_path / "resumed", ds_name) == [10, 10]

    for name in ("resumed", "whole"):
        train(config_of(3).model_copy(update={"run_dir": tmp_path / name, "checkpoint_every": 4}))

    resumed, whole = read_metrics(tmp_path / "resumed"), read_metrics(tmp_path / "whole")
    assert [row["step"] for row in resumed] == list(range(1, ITERATIONS + 1))
    for level in ("pretrain", "head", "mask"):
        expected = [row[f"loss/{level}"] for row in whole]
        assert [row[f"loss/{level}"] for row in resumed] == pytest.approx(expected, abs=LOSS_BOUND, rel=0)


def test_two_levels_differ_from_three(one: dict[str, Any]) -> None:
    assert one["plain"]["curve"] != one["plain, two levels"]["curve"]
