"""The hypergradient on shards: ZeRO 0 to 3 on one and two ranks against plain torch on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mlomae.config import Config
from mlomae.data.batches import Batch
from mlomae.distributed import collectives
from mlomae.distributed.deepspeed_engine import DeepSpeedEngine
from mlomae.distributed.engine import Engine, TorchEngine
from mlomae.distributed.env import World, join_world
from mlomae.hypergrad_check import mask_gradient
from mlomae.levels import HeadLevel, MaskLevel, PretrainLevel
from mlomae.models.head import ClassifierHead
from mlomae.models.mae import MaskedAutoencoder
from mlomae.models.masking import build_masking_network
from mlomae.models.selection import MaskPolicy
from tests.distributed.ranks import run_ranks
from tests.integration.tiny import tiny_config

pytestmark = pytest.mark.dist

STEPS, BATCH, CLASSES = 3, 8, 4
STAGES = (0, 1, 2, 3)
# Whole weights on every rank are needed by jvp.
SETTINGS: dict[str, dict[str, str]] = {
    "fd": {"estimator": "fd"},
    "fd-forward": {"estimator": "fd-forward"},
    "fd, adam": {"estimator": "fd", "precondition": "adam"},
    "jvp": {"estimator": "jvp"},
    "jvp, adam": {"estimator": "jvp", "precondition": "adam"},
    "fd, micro-batches": {"estimator": "fd", "pretrain.micro_batches": "2"},
}
Results = dict[Any, Any]


class RankStream:
    """Random images with labels; each rank gets its rows of the same global batches."""

    def __init__(self, seed: int, world: World) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._rows = BATCH // world.size
        self._first = world.rank * self._rows
        self._number = -1

    def next(self) -> Batch:
        images = torch.randn(BATCH, 1, 8, 8, generator=self._generator)
        labels = torch.randint(CLASSES, (BATCH,), generator=self._generator)
        rows = slice(self._first, self._first + self._rows)
        self._number += 1
        return Batch(images[rows], labels[rows], self._number, self._first)


class Run:
    """Three levels; the autoencoder's engine is plain torch or DeepSpeed's."""

    def __init__(self, stage: int | None, settings: dict[str, str], world: World) -> None:
        fields = {name if "." in name else f"hypergradient.{name}": value for name, value in settings.items()}
        # A large radius: what is compared is the arithmetic, not rounding divided by a small number.
        config = tiny_config(
            {"hypergradient.radius": 1e-2, "pretrain.clip": 0.05, "pretrain.eps": 1e-4, **fields}
        )
        torch.manual_seed(0)
        autoencoder = MaskedAutoencoder(config.model)
        width = autoencoder.encoder.embed_dim
        head = TorchEngine(ClassifierHead(width, CLASSES), config.head)
        network = build_masking_network(config.masking, config.model.grid, width)
        policy = MaskPolicy(config.masking, config.model.grid, config.num_keep, seed=0)
        streams: list[Any] = [RankStream(seed, world) for seed in (1, 2, 3)]
        self.config = config
        self.pretrain = PretrainLevel(
            self._engine(autoencoder, stage, config, world), streams[0], config, policy, network
        )
        self.head = HeadLevel(head, streams[1], config)
        self.mask = MaskLevel(TorchEngine(network, config.mask), streams[2], config, self.pretrain, self.head)

    @staticmethod
    def _engine(autoencoder: MaskedAutoencoder, stage: int | None, config: Config, world: World) -> Engine:
        parts = config.pretrain.micro_batches
        if stage is None:
            return TorchEngine(autoencoder, config.pretrain, micro_batches=parts)
        section = {"zero_optimization": {"stage": stage}}
        return DeepSpeedEngine(autoencoder, config.pretrain, section, world, parts)

    def iterate(self, iteration: int) -> Results:
        """One outer iteration; what it computed, averaged over ranks."""
        hypergradient, space = self.mask.hypergradient, self.mask.hypergradient.space
        masked, metrics = self.pretrain.step(self.pretrain.stream.next(), iteration, record=True)
        train, heldout = self.head.stream.next(), self.mask.stream.next()
        direction = hypergradient.direction(train, heldout, iteration)
        before = [value.clone() for value in space.values()]
        influence, more = hypergradient.influence(masked, direction)
        same = all(torch.equal(a, b) for a, b in zip(before, space.values(), strict=True))
        with torch.no_grad():
            # Forward passes see the restored weights too, also those that ZeRO 3 keeps gathered.
            after = self.pretrain.engine.module(masked.images, masked.selection).mean()
        gradient = mask_gradient(self.mask.engine.module, masked, influence)
        assert train.labels is not None
        self.head.step(direction.train_features, train.labels, iteration)
        scalars = torch.stack([metrics["loss/pretrain"], direction.heldout_loss, after])
        mean, gradient = collectives.average([scalars, gradient])
        return {
            "restored": same,
            "scalars": mean.tolist(),
            "norm": float(more["hypergradient/direction_norm"]),
            "gradient": gradient,
            "held": sum(v.numel() for v in direction.values),
        }


def _run(cases: list[tuple[int | None, str]]) -> Results:
    world = join_world("cpu", always_group=True)
    results: Results = {}
    for stage, name in cases:
        run = Run(stage, SETTINGS[name], world)
        results[stage, name] = [run.iterate(iteration) for iteration in range(STEPS)]
    return results


def _cases(stages: tuple[int, ...]) -> list[tuple[int | None, str]]:
    return [(s, name) for s in stages for name in SETTINGS if not (s == 3 and name.startswith("jvp"))]


@pytest.fixture(scope="module")
def plain() -> Results:
    (result,) = run_ranks(1, _run, [(None, name) for name in SETTINGS])
    return {name: rows for (_, name), rows in result.items()}


@pytest.fixture(scope="module", params=[1, 2])
def sharded(request: pytest.FixtureRequest) -> tuple[int, list[Results]]:
    return request.param, run_ranks(request.param, _run, _cases(STAGES))


@pytest.mark.slow
def test_every_stage_computes_the_hypergradient_of_plain_torch(
    sharded: tuple[int, list[Results]], plain: Results
) -> None:
    world_size, ranks = sharded
    for (stage, name), rows in ranks[0].items():
        for found, expected in zip(rows, plain[name], strict=True):
            where = f"{world_size} ranks, ZeRO {stage}, {name}"
            assert found["scalars"] == pytest.approx(expected["scalars"], rel=1e-5), where
            assert found["norm"] == pytest.approx(expected["norm"], rel=1e-4), where
            error = (found["gradient"] - expected["gradient"]).norm() / expected["gradient"].norm()
            assert error < 2e-3, where  # rounding divided by the radius; jvp: below 1e-5


@pytest.mark.slow
def test_weights_are_restored_bit_for_bit(sharded: tuple[int, list[Results]]) -> None:
    for results in sharded[1]:
        assert all(row["restored"] for rows in results.values() for row in rows)


@pytest.mark.slow
def test_no_rank_holds_more_of_v_than_its_shard(sharded: tuple[int, list[Results]]) -> None:
    world_size, ranks = sharded
    total = ranks[0][0, "fd"][0]["held"]
    for results in ranks:
        for stage in (1, 2, 3):
            held = results[stage, "fd"][0]["held"]
            # Padding: a few numbers per parameter at most.
            assert total / world_size <= held <= 1.05 * total / world_size + 64


@pytest.mark.slow
def test_the_settings_differ(plain: Results) -> None:
    gradients: list[Tensor] = [plain[name][1]["gradient"] for name in ("fd", "fd-forward", "fd, adam")]
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-3)
    assert not torch.allclose(gradients[0], gradients[2], rtol=1e-1)
