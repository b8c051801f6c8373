"""Collectives on two ranks, and what rests on them alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mlomae.distributed import collectives
from mlomae.distributed.engine import TorchEngine
from mlomae.distributed.env import join_world
from mlomae.errors import UserError
from mlomae.guards import FiniteGuard
from mlomae.meters import Meters, Scalars
from mlomae.sections import PretrainConfig
from tests.distributed.ranks import run_ranks


def test_one_process_is_its_own_average() -> None:
    tensor = torch.arange(3.0)

    assert collectives.average([tensor])[0] is tensor
    assert collectives.maximum(tensor) is tensor
    assert collectives.gather_object("a") == ["a"]
    assert collectives.broadcast_object("a") == "a"


def _exchange() -> dict[str, Any]:
    world = join_world("cpu")
    row = torch.arange(6.0).view(2, 3) * (world.rank + 1)
    # Transposed: gradients of convolutions may come in such layouts too.
    mean, transposed = collectives.average([row.clone(), row.clone().t()])
    return {
        "world": (world.rank, world.size, world.primary),
        "mean": mean,
        "transposed": transposed,
        "thirds": collectives.average([torch.full((1000,), 1 / 3) * (world.rank + 1)])[0],
        "maximum": collectives.maximum(torch.tensor([world.rank, -world.rank])),
        "gathered": collectives.gather_object({"rank": world.rank}),
        "broadcast": collectives.broadcast_object({"rank": world.rank}),
        "meters": _read_meters(float(world.rank)),
        "guard": _check_guard(world.rank),
    }


def _read_meters(value: float) -> dict[str, float]:
    meters = Meters()
    meters.add({"loss": torch.tensor(value)})
    meters.add({"loss": torch.tensor(value + 2)})
    return Scalars(meters.take()).read()


def _check_guard(rank: int) -> str:
    """Rank 1 alone sees a level break."""
    guard = FiniteGuard()
    fine, bad = torch.tensor(1.0), torch.tensor(float("inf") if rank else 1.0)
    guard.watch("pretrain", 6, fine, fine, 0)
    guard.check()
    guard.watch("pretrain", 7, bad, fine, 0)
    guard.watch("head", 7, fine, bad, 0)
    guard.watch("pretrain", 8, fine, fine, 0)
    try:
        guard.check()
    except UserError as error:
        return str(error)
    return "passed"


@pytest.mark.dist
def test_two_ranks_agree() -> None:
    results = run_ranks(2, _exchange)

    expected = torch.arange(6.0).view(2, 3) * 1.5
    for rank, result in enumerate(results):
        assert result["world"] == (rank, 2, rank == 0)
        torch.testing.assert_close(result["mean"], expected, rtol=0, atol=0)
        torch.testing.assert_close(result["transposed"], expected.t(), rtol=0, atol=0)
        assert result["maximum"].tolist() == [1, 0]
        assert result["broadcast"] == {"rank": 0}
        assert result["meters"] == {"loss": 1.5}  # over two steps and two ranks
    assert torch.equal(results[0]["thirds"], results[1]["thirds"])
    assert results[0]["gathered"] == [{"rank": 0}, {"rank": 1}]
    assert results[1]["gathered"] is None
    # Broken in the same iteration, the level that was watched first is named, on every rank.
    messages = [result["guard"] for result in results]
    assert messages[0] == messages[1]
    assert messages[0].startswith("pretrain level: the loss or the weights are not finite at iteration 7; ")


class _Transposed(nn.Module):
    """A weight whose gradient is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 3).t())

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).sum()


def _clipped_step() -> tuple[float, Tensor]:
    world = join_world("cpu")
    engine = TorchEngine(_Transposed(), PretrainConfig(clip=0.5))
    weight = engine.module.weight
    seen: list[Tensor] = []
    engine.optimizer.register_step_pre_hook(lambda *_: seen.append(weight.grad))
    engine.descend(engine(torch.ones(3, 2) * (1 + 2 * world.rank)), lr=0.1)
    assert weight.grad is None  # its memory is free for what comes next
    return float(engine.grad_norm or 0), seen[0]


@pytest.mark.dist
def test_clipping_uses_the_norm_of_the_averaged_gradient() -> None:
    expected = 2 * 6**0.5  # the ranks' gradients are 1 and 3 everywhere
    for norm, gradient in run_ranks(2, _clipped_step):
        assert norm == pytest.approx(expected)
        torch.testing.assert_close(gradient, torch.full((3, 2), 2 * 0.5 / expected), rtol=1e-5, atol=0)


def _act_on_primary(case: str) -> str:
    world = join_world("cpu")
    done: list[int] = []

    def action() -> None:
        done.append(world.rank)
        if case == "refused":
            raise UserError("run_dir x: is taken")
        if case == "disk full":
            raise OSError(28, "No space left on device", "x/state.json")

    try:
        collectives.on_primary(action)
    except UserError as error:
        return str(error)
    return f"done by {done}"


@pytest.mark.dist
@pytest.mark.parametrize(
    ("case", "outcomes"),
    [
        ("fine", ["done by [0]", "done by []"]),
        ("refused", ["run_dir x: is taken"] * 2),
        ("disk full", ["x/state.json: cannot be written (No space left on device)"] * 2),
    ],
)
def test_what_rank_0_meets_stops_every_rank(case: str, outcomes: list[str]) -> None:
    assert run_ranks(2, _act_on_primary, case) == outcomes
