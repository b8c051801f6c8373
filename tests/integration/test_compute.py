"""What the fields of ``compute`` and micro-batches change, and what they must not change."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from mlomae.compilation import resolve_execution
from mlomae.distributed.engine import TorchEngine
from mlomae.distributed.env import join_world
from mlomae.errors import UserError
from mlomae.precision import resolve_precision, with_precision
from mlomae.run_dir import RunDir
from mlomae.trainer import Trainer
from tests.distributed.ranks import run_ranks
from tests.integration.tiny import Fields, read_metrics, tiny_config, train

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def build(tmp_path: Path, fields: Fields) -> Trainer:
    config = tiny_config({"run_dir": tmp_path, "iterations": 100, **fields})
    return Trainer(config, RunDir(tmp_path, config), join_world(config.device), None)


def losses(trainer: Trainer, first: int, last: int) -> list[dict[str, float]]:
    """Scalars of some iterations, without those that steer the radius."""
    rows = []
    for iteration in range(first, last):
        trainer.iterate(iteration)
        means = {name: float(value) for name, value in trainer.meters.take().items()}
        rows.append({k: v for k, v in means.items() if k not in ("hypergradient/estimated_error",)})
    return rows


def assert_close(
    rows: list[dict[str, float]], expected: list[dict[str, float]], rel: float, absolute: float = 1e-12
) -> None:
    for row, other in zip(rows, expected, strict=True):
        assert row == pytest.approx(other, rel=rel, abs=absolute)


@pytest.mark.parametrize("estimator", ["fd-forward", "jvp"])
def test_micro_batches_take_the_step_of_the_whole_batch(tmp_path: Path, estimator: str) -> None:
    fields = {"hypergradient.estimator": estimator, "hypergradient.check_every": 0}
    whole, parts = (build(tmp_path / str(n), {**fields, "pretrain.micro_batches": n}) for n in (1, 4))
    calls: Counter[int] = Counter()
    parts.levels.pretrain.autoencoder.register_forward_pre_hook(
        lambda _, inputs: calls.update([len(inputs[0])])
    )
    # One-sided differences are of rounding size here: 1.2e-3 was seen.
    assert_close(losses(parts, 0, 3), losses(whole, 0, 3), rel=3e-3)
    # Two steps in four parts, three times; the influence takes the whole batch.
    assert calls[2] == 24 and set(calls) == {2, 8}


def test_micro_batches_must_divide_the_share_of_a_rank(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^pretrain\.micro_batches: 3 does not divide .* 8 images"):
        build(tmp_path, {"pretrain.micro_batches": 3})


def test_activation_checkpointing_computes_blocks_twice_and_nothing_else(tmp_path: Path) -> None:
    runs, found = {}, {}
    for enabled in (False, True):
        trainer = build(tmp_path / str(enabled), {"compute.activation_checkpointing": enabled})
        calls: Counter[str] = Counter()
        for block in trainer.levels.pretrain.autoencoder.modules():
            if isinstance(block, Block):
                block.norm1.register_forward_hook(lambda *_, calls=calls: calls.update(["norm1"]))
        runs[enabled] = losses(trainer, 0, 2)
        found[enabled] = calls["norm1"]
    assert runs[True] == runs[False]
    assert found[True] > found[False]


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"compute.precision": "bf16", "pretrain.micro_batches": 2, "masking.network": "mlp"},
        {
            "compute.execution": "graphs",
            "compute.activation_checkpointing": True,
            "model.pool": "cls",
            "hypergradient.every": 2,
        },
    ],
    ids=["bf16", "graphs"],
)
def test_compiled_modules_have_no_graph_breaks_and_are_compiled_once(tmp_path: Path, fields: Fields) -> None:
    torch._dynamo.reset()
    counters.clear()
    compiled = build(tmp_path / "compiled", {"compute.execution": "compiled", **fields})
    eager = build(tmp_path / "eager", {**fields, "compute.execution": "eager"})
    bf16 = fields.get("compute.precision") == "bf16"
    assert_close(losses(compiled, 0, 4), losses(eager, 0, 4), rel=2e-2 if bf16 else 1e-3, absolute=1e-8)

    assert not counters["graph_break"]
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 3  # the pretrain step, features, scores, the mask step
    with torch.compiler.set_stance("fail_on_recompile"):
        losses(compiled, 4, 9)
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.slow
@pytest.mark.dist
def test_deepspeed_runs_a_compiled_module_past_its_timers_first_steps(tmp_path: Path) -> None:
    (found,) = run_ranks(1, _compiled_under_deepspeed, tmp_path)
    eager = build(tmp_path / "plain", {})
    assert_close(found, losses(eager, 0, 4), rel=1e-3, absolute=1e-8)


def _compiled_under_deepspeed(folder: Path) -> list[dict[str, float]]:
    world = join_world("cpu", always_group=True)
    config = tiny_config({"run_dir": folder, "iterations": 100, "compute.execution": "compiled"})
    trainer = Trainer(config, RunDir(folder, config), world, {"zero_optimization": {"stage": 1}})
    found = losses(trainer, 0, 4)
    assert not counters["graph_break"]
    return found


class HostReads(TorchDispatchMode):
    """Counts the operators that a GPU's host has to wait for, by name."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero")

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in self.WAITING:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"hypergradient.estimator": "jvp", "compute.precision": "bf16"},
        {"hypergradient.estimator": "fd-forward", "pretrain.clip": 1.0, "masking.selection": "topk"},
        {"hypergradient.precondition": "adam", "pretrain.micro_batches": 2, "masking.network": "mlp"},
        {"masking.policy": "block"},
    ],
    ids=["default", "bf16", "one-sided", "adam", "block"],
)
def test_an_iteration_never_waits_for_the_device(tmp_path: Path, fields: Fields) -> None:
    trainer = build(tmp_path, {"data.augment": "shift", **fields})
    trainer.iterate(0)  # checks the radius, which needs numbers on the host
    with HostReads() as reads:
        for iteration in range(1, 4):
            trainer.iterate(iteration)
    assert not reads.found


def test_host_reads_are_noticed() -> None:
    with HostReads() as reads:
        float(torch.ones(()))
    assert reads.found == {"_local_scalar_dense": 1}


@pytest.mark.gpu
@pytest.mark.parametrize("execution", ["eager", "compiled"])
def test_an_iteration_on_a_gpu_never_synchronises(tmp_path: Path, execution: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    trainer = build(tmp_path, {"device": "cuda", "compute.execution": execution, "hypergradient.every": 2})
    for iteration in range(4):
        trainer.iterate(iteration)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for iteration in range(4, 8):
            trainer.iterate(iteration)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_precision_follows_the_device_and_the_deepspeed_configuration() -> None:
    autocast, without = {"torch_autocast": {"enabled": True}}, {"torch_autocast": {"enabled": False}}
    assert [resolve_precision("auto", device, None) for device in (CPU, CUDA)] == ["float32", "bf16"]
    assert resolve_precision("auto", CPU, autocast) == "bf16"
    assert resolve_precision("auto", CUDA, without) == "float32"
    assert resolve_precision("tf32", CUDA, without) == "tf32"
    assert resolve_precision("bf16", CPU, {}) == "bf16"
    assert with_precision({}, "bf16") == {"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}
    assert with_precision({}, "tf32") == {}
    for wanted, section in (("bf16", without), ("float32", autocast)):
        with pytest.raises(UserError, match=r"^compute\.precision: .* torch_autocast\.enabled"):
            resolve_precision(wanted, CPU, section)
    with pytest.raises(UserError, match=r"^compute\.precision: tf32 needs a GPU"):
        resolve_precision("tf32", CPU, None)


def test_precision_reaches_the_engines_and_is_told(tmp_path: Path) -> None:
    trainer = build(tmp_path, {"compute.precision": "bf16"})
    for level in trainer.levels.by_name().values():
        assert isinstance(level.engine, TorchEngine) and level.engine.mixed
        assert {p.dtype for p in level.engine.module.parameters()} == {torch.float32}
    assert "precision: bf16 autocast" in trainer.implementations


def test_execution_follows_the_device() -> None:
    assert [resolve_execution("auto", device) for device in (CPU, CUDA)] == ["eager", "compiled"]
    assert resolve_execution("graphs", CPU) == "graphs"


def test_a_resumed_run_keeps_its_precision(tmp_path: Path) -> None:
    fields = {"run_dir": tmp_path, "iterations": 2}
    train(tiny_config(fields))
    trainer = build(tmp_path, {"iterations": 2})
    trainer.precision = "bf16"  # as on a GPU, where auto means bf16
    with pytest.raises(
        UserError, match=r"^compute\.precision: the checkpoint was trained in float32, .* bf16"
    ):
        trainer.fit()


def test_an_interrupt_loses_no_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    iterate = Trainer.iterate

    def interrupted(self: Trainer, iteration: int) -> Any:
        if iteration == 3:
            raise KeyboardInterrupt
        return iterate(self, iteration)

    monkeypatch.setattr(Trainer, "iterate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tiny_config({"run_dir": tmp_path, "iterations": 9, "checkpoint_every": 9}))
    assert [row["step"] for row in read_metrics(tmp_path)] == [1, 2, 3]
