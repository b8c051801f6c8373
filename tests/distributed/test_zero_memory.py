"""What a rank holds under ZeRO 3, between steps and at the peak of one."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mlomae.distributed.deepspeed_engine import DeepSpeedEngine
from mlomae.distributed.env import join_world
from mlomae.memory import peak_bytes
from mlomae.models.mae import MaskedAutoencoder
from mlomae.models.selection import MaskPolicy
from mlomae.sections import LevelConfig
from tests.distributed.ranks import run_ranks
from tests.integration.tiny import tiny_config

pytestmark = pytest.mark.dist

ZERO3 = Path(__file__).resolve().parents[2] / "ds_configs" / "zero3.json"
# The shipped values are for models a hundred times as large, such as vit_huge.
SMALLER = 100
SIZES = (
    "reduce_bucket_size",
    "sub_group_size",
    "stage3_prefetch_bucket_size",
    "stage3_max_live_parameters",
    "stage3_max_reuse_distance",
)
IMAGES = 2


def _held() -> dict[int, int]:
    """Bytes of all storages that Python's tensors use, by address."""
    tensors = (thing for thing in gc.get_objects() if isinstance(thing, Tensor))
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.device.type == "cpu"]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}


def _measure() -> dict[str, int]:
    world = join_world("cpu", always_group=True)
    before = _held()
    config = tiny_config({"model.arch": "vit_tiny", "model.decoder_dim": 64})
    torch.manual_seed(0)
    module = MaskedAutoencoder(config.model)
    weights = sum(parameter.numel() for parameter in module.parameters())
    section = json.loads(ZERO3.read_text())["zero_optimization"]
    section |= {name: section[name] // SMALLER for name in SIZES}
    rates = LevelConfig(batch_size=IMAGES * world.size)
    engine = DeepSpeedEngine(module, rates, {"zero_optimization": section}, world)
    images = torch.randn(IMAGES, 1, 8, 8)
    policy = MaskPolicy(config.masking, config.model.grid, config.num_keep, seed=0)
    selection = policy.select(torch.randn(IMAGES, 16), IMAGES, 0, 0, images.device)

    def step() -> None:
        engine.descend(engine(images, selection).mean(), 1e-3)

    # Afterwards there are moments, and DeepSpeed knows the order of the modules.
    step()
    step()
    gc.collect()
    new: dict[str, Any] = {"persistent": sum(size for at, size in _held().items() if at not in before)}
    peak = peak_bytes(step, images.device)
    return {**new, "peak": new["persistent"] + peak, "weights": 4 * weights}


def test_two_ranks_share_what_one_would_hold() -> None:
    (alone,), ranks = run_ranks(1, _measure), run_ranks(2, _measure)

    # The weights and two moments are there, which the measure has to see.
    assert alone["persistent"] >= 3 * alone["weights"]
    for rank in ranks:
        assert rank["persistent"] <= 0.6 * alone["persistent"]
        assert rank["peak"] <= 0.6 * alone["peak"]
