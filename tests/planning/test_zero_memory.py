"""Memory of a rank under ZeRO between steps, predicted and found."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor

from mlomae.distributed.deepspeed_engine import DeepSpeedEngine
from mlomae.distributed.env import join_world
from mlomae.models.mae import MaskedAutoencoder
from mlomae.models.selection import PatchSelection
from mlomae.planning.memory import Memory
from mlomae.planning.sharding import read_sharding
from mlomae_kernels import select_patches
from tests.distributed.ranks import run_ranks
from tests.integration.tiny import tiny_config

pytestmark = [pytest.mark.dist, pytest.mark.slow]

RANKS, BATCH = 2, 4
FIELDS = {"model.arch": "vit_micro", "model.decoder_dim": 64}
ZERO: dict[str, Any] = {
    "reduce_bucket_size": 50_000,
    "overlap_comm": False,
    # Some of the small model's weights have to count as large ones.
    "stage3_param_persistence_threshold": 1000,
    "stage3_prefetch_bucket_size": 1000,
    "stage3_max_reuse_distance": 0,
}


def _found(stage: int) -> int:
    """Bytes of all tensors of this process after two steps, without those that were there before."""
    world = join_world("cpu", always_group=True)
    before = _bytes()
    config = tiny_config(FIELDS)
    section = {"zero_optimization": {"stage": stage, **ZERO}}
    engine = DeepSpeedEngine(MaskedAutoencoder(config.model), config.pretrain, section, world)
    images = torch.randn(BATCH, 1, 8, 8)
    selection = PatchSelection(*select_patches(torch.rand(BATCH, 16), config.num_keep))
    for _ in range(2):
        engine.descend(engine(images, selection).sum(), lr=1e-3)
    del images, selection
    return _bytes() - before


def _bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage._cdata] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_what_a_rank_holds_between_steps(stage: int) -> None:
    config = tiny_config({**FIELDS, "masking.policy": "random"})
    sharding = read_sharding({"zero_optimization": {"stage": stage, **ZERO}}, RANKS, bf16=False)
    expected = sum(Memory(config, sharding, "float32", 0).lasting().values())
    for found in run_ranks(RANKS, _found, stage):
        assert found == pytest.approx(expected, rel=0.1)
