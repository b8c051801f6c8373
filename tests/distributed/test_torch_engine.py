"""The plain engine against torch's own optimizer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mlomae.distributed.engine import TorchEngine, build_adamw
from mlomae.sections import LevelConfig
from tests.distributed.problem import Model, batches, fresh_model, rate, run_engine


@pytest.mark.parametrize("clip", [0.0, 0.05], ids=["unclipped", "clipped"])
def test_matches_torch_adamw_written_out(clip: float) -> None:
    config = LevelConfig(lr=0.05, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-6, warmup=0.25, clip=clip)
    engine, reference = TorchEngine(fresh_model(), config), fresh_model()
    optimizer = torch.optim.AdamW(
        [
            {"params": [reference.linear.weight, reference.out.weight], "weight_decay": 0.3},
            {
                "params": [
                    reference.linear.bias,
                    reference.norm.weight,
                    reference.norm.bias,
                    reference.cls_token,
                ],
                "weight_decay": 0.0,
            },
        ],
        betas=(0.8, 0.9),
        eps=1e-6,
    )
    norms = []
    for step, (x, y) in enumerate(batches()):
        optimizer.zero_grad()
        (4 * F.cross_entropy(reference(x), y)).backward()
        parameters = [p for p in reference.parameters() if p.requires_grad]
        norms.append(torch.stack([p.grad.square().sum() for p in parameters]).sum().sqrt())  # type: ignore[union-attr]  # just set
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, config)
        optimizer.step()
        engine.descend(4 * F.cross_entropy(engine(x), y), rate(step, config))
        # The norm that is reported is the one before clipping.
        torch.testing.assert_close(engine.grad_norm, norms[-1], rtol=1e-5, atol=0)

    assert min(norms) > 0.05
    for name, value in reference.state_dict().items():
        torch.testing.assert_close(engine.module.state_dict()[name], value, rtol=1e-5, atol=1e-7)
    assert torch.equal(engine.module.get_parameter("pos_embed"), fresh_model().pos_embed)


def test_clipping_changes_the_outcome() -> None:
    free, clipped = LevelConfig(lr=0.05, eps=1e-3), LevelConfig(lr=0.05, eps=1e-3, clip=1e-3)

    assert (
        run_engine(TorchEngine(fresh_model(), free), free)[1:]
        != run_engine(TorchEngine(fresh_model(), clipped), clipped)[1:]
    )


def test_only_matrices_are_decayed() -> None:
    model = fresh_model()
    groups = build_adamw(model, LevelConfig(weight_decay=0.3)).param_groups

    names = {parameter: name for name, parameter in model.named_parameters()}
    by_decay = {group["weight_decay"]: {names[p] for p in group["params"]} for group in groups}
    assert by_decay == {
        0.3: {"linear.weight", "out.weight"},
        0.0: {"linear.bias", "norm.weight", "norm.bias", "cls_token"},
    }


def test_a_module_without_matrices_has_one_group() -> None:
    assert len(build_adamw(nn.LayerNorm(4), LevelConfig()).param_groups) == 1


def test_a_restored_engine_continues_bit_for_bit() -> None:
    config = LevelConfig(lr=0.05, clip=0.1)
    engine = TorchEngine(fresh_model(), config)
    run_engine(engine, config, 0, 3)
    state = engine.snapshot()
    expected = run_engine(engine, config, 3, 5)

    # Another history before: nothing of it may be left.
    other = TorchEngine(Model(), config)
    run_engine(other, config, 0, 2)
    other.load_state_dict(state)
    assert all(torch.equal(other.snapshot()[name], value) for name, value in state.items())
    assert run_engine(other, config, 3, 5) == expected
    for name, value in engine.snapshot().items():
        assert torch.equal(other.snapshot()[name], value), name


def test_after_a_skipped_step_a_restored_engine_records_the_same_steps() -> None:
    config = LevelConfig(lr=0.05, eps=1e-3)
    engine, restored = TorchEngine(fresh_model(), config), TorchEngine(fresh_model(), config)
    (x, y), *_ = batches()
    engine.descend(F.cross_entropy(engine(x), y), 0.05)
    engine.descend(F.cross_entropy(engine(x), y) * torch.nan, 0.05)
    assert int(engine.skipped_steps) == 1
    restored.load_state_dict(engine.snapshot())

    points, slopes = [], []
    for each in (engine, restored):
        before = [p.detach().clone() for p in each.module.parameters() if p.requires_grad]
        record = each.descend_recorded(F.cross_entropy(each(x), y), 0.05, slope=True)
        for found, expected in zip(record.point(), before, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
        points.append(record.point())
        slopes.append(record.slope)
    for own, other in zip([*points[0], *(slopes[0] or [])], [*points[1], *(slopes[1] or [])], strict=True):
        assert torch.equal(own, other)


def test_a_loaded_state_is_not_shared() -> None:
    config = LevelConfig(lr=0.05)
    engine, other = TorchEngine(fresh_model(), config), TorchEngine(fresh_model(), config)
    run_engine(engine, config, 0, 2)
    other.load_state_dict(engine.snapshot())
    before = engine.snapshot()

    run_engine(other, config, 2, 2)

    assert all(torch.equal(engine.snapshot()[name], value) for name, value in before.items())


def test_the_state_before_the_first_step_forgets_later_moments() -> None:
    config = LevelConfig(lr=0.05)
    engine = TorchEngine(fresh_model(), config)
    start = engine.snapshot()
    expected = run_engine(engine, config)

    engine.load_state_dict(start)

    assert float(start["step"]) == 0
    assert run_engine(engine, config) == expected


def test_the_shapes_of_a_state_are_known_beforehand() -> None:
    config = LevelConfig()
    engine = TorchEngine(fresh_model(), config)
    shapes = engine.shapes()
    run_engine(engine, config, 0, 1)

    assert shapes == {name: tuple(value.shape) for name, value in engine.snapshot().items()}
    weights = {name for name in shapes if name.startswith("weight.")}
    assert weights == {f"weight.{name}" for name in engine.module.state_dict()}
