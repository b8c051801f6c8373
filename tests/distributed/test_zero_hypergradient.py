"""The hypergradient on shards: ZeRO 0 to 3 on one and two ranks against plain torch on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mlomae.data.batches import Batch
from mlomae.distributed import collectives
from mlomae.distributed.deepspeed_engine import DeepSpeedEngine
from mlomae.distributed.engine import Engine, TorchEngine
from mlomae.distributed.env import World, join_world
from mlomae.hypergrad_check import mask_gradient
from mlomae.levels import HeadLevel, MaskLevel, PretrainLevel
from mlomae.models.encoder import num_pooled
from mlomae.models.head import ClassifierHead
from mlomae.models.mae import MaskedAutoencoder
from mlomae.models.masking import MaskingNetwork, build_masking_network
from mlomae.models.selection import MaskPolicy
from mlomae.sections import LevelConfig
from tests.distributed.ranks import run_ranks
from tests.integration.tiny import tiny_config

pytestmark = pytest.mark.dist

STEPS, BATCH, CLASSES = 3, 8, 4
ON_HOST = {"device": "cpu"}
# Nothing stays gathered, and there are several groups.
SHARDED = {
    "stage": 3,
    "stage3_param_persistence_threshold": 0,
    "stage3_max_live_parameters": 2000,
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 1000,
    "sub_group_size": 3000,
}
SECTIONS: dict[str, dict[str, Any]] = {
    "0": {"stage": 0},
    "1": {"stage": 1},
    "2": {"stage": 2},
    "2, offloaded": {"stage": 2, "offload_optimizer": ON_HOST},
    "3": SHARDED,
    "3, offloaded": {**SHARDED, "offload_optimizer": ON_HOST, "offload_param": ON_HOST},
    # The head and the masking network too.
    "3, all levels": SHARDED,
}
PLAIN = "plain torch"
# Whole weights on every rank are needed by jvp.
SETTINGS: dict[str, dict[str, str]] = {
    "fd": {"estimator": "fd"},
    "fd-forward": {"estimator": "fd-forward"},
    "fd, adam": {"estimator": "fd", "precondition": "adam"},
    "jvp": {"estimator": "jvp"},
    "jvp, adam": {"estimator": "jvp", "precondition": "adam"},
    "fd, micro-batches": {"estimator": "fd", "pretrain.micro_batches": "2"},
    "recomputed, mlp, cls": {
        "estimator": "fd",
        "compute.activation_checkpointing": "true",
        "masking.network": "mlp",
        "model.pool": "cls",
        "model.predict": "all",
    },
    "recomputed, cls+mean": {
        "estimator": "fd-forward",
        "compute.activation_checkpointing": "true",
        "model.pool": "cls+mean",
        "model.decoder_depth": "2",
    },
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
    """Three levels; the autoencoder's engine is plain torch or DeepSpeed's.

    Args:
        kind: of ``SECTIONS``, or plain torch.
    """

    def __init__(self, kind: str, settings: dict[str, str], world: World) -> None:
        fields = {name if "." in name else f"hypergradient.{name}": value for name, value in settings.items()}
        # A large radius: what is compared is the arithmetic, not rounding divided by a small number.
        config = tiny_config(
            {"hypergradient.radius": 1e-2, "pretrain.clip": 0.05, "pretrain.eps": 1e-4, **fields}
        )
        torch.manual_seed(0)
        autoencoder = MaskedAutoencoder(config.model)
        autoencoder.set_activation_checkpointing(config.compute.activation_checkpointing)
        width = autoencoder.encoder.embed_dim
        upper = kind if kind.endswith("all levels") else PLAIN
        head = self._engine(
            ClassifierHead(num_pooled(width, config.model.pool), CLASSES), upper, config.head, world
        )
        network = build_masking_network(config.masking, config.model.grid, width)
        policy = MaskPolicy(config.masking, config.model.grid, config.num_keep, seed=0)
        streams: list[Any] = [RankStream(seed, world) for seed in (1, 2, 3)]
        self.config = config
        self.pretrain = PretrainLevel(
            self._engine(autoencoder, kind, config.pretrain, world, config.pretrain.micro_batches),
            streams[0],
            config,
            policy,
            network,
        )
        self.head = HeadLevel(head, streams[1], config)
        mask = self._engine(network, upper, config.mask, world)
        self.mask = MaskLevel(mask, streams[2], config, self.pretrain, self.head)

    @staticmethod
    def _engine(module: nn.Module, kind: str, rates: LevelConfig, world: World, parts: int = 1) -> Engine:
        if kind == PLAIN:
            return TorchEngine(module, rates, micro_batches=parts)
        return DeepSpeedEngine(module, rates, {"zero_optimization": SECTIONS[kind]}, world, parts)

    def iterate(self, iteration: int) -> Results:
        """One outer iteration; what it computed, averaged over ranks."""
        hypergradient, space = self.mask.hypergradient, self.mask.hypergradient.space
        masked, metrics = self.pretrain.step(self.pretrain.stream.next(), iteration, record=True)
        train, heldout = self.head.stream.next(), self.mask.stream.next()
        direction = hypergradient.direction(train, heldout, iteration)
        before = [value.clone() for value in space.values()]
        influence, more = hypergradient.influence(masked, direction)
        empty = all(parameter.numel() == 0 for parameter in self.pretrain.engine.module.parameters())
        same = all(torch.equal(a, b) for a, b in zip(before, space.values(), strict=True))
        with torch.no_grad():
            # Forward passes see the restored weights too, also those that ZeRO 3 keeps gathered.
            after = self.pretrain.engine.module(masked.images, masked.selection).mean()
        network = self.mask.engine.whole_module()
        assert isinstance(network, MaskingNetwork)
        gradient = mask_gradient(network, masked, influence)
        assert train.labels is not None
        self.head.step(direction.train_features, train.labels, iteration)
        self.mask.engine.descend(self.mask.engine(masked.tokens).square().mean(), 1e-2)
        scalars = torch.stack([metrics["loss/pretrain"], direction.heldout_loss, after])
        mean, gradient = collectives.average([scalars, gradient])
        return {
            "restored": same,
            "scalars": mean.tolist(),
            "norm": float(more["hypergradient/direction_norm"]),
            "gradient": gradient,
            "empty": empty,
            "held": sum(v.numel() for v in direction.values),
        }


def _run(cases: list[tuple[str, str]]) -> Results:
    world = join_world("cpu", always_group=True)
    results: Results = {}
    for kind, name in cases:
        run = Run(kind, SETTINGS[name], world)
        results[kind, name] = [run.iterate(iteration) for iteration in range(STEPS)]
    return results


def _cases() -> list[tuple[str, str]]:
    """Every stage in every setting; offloading and the other levels where they make a difference."""
    cases = []
    for kind, section in SECTIONS.items():
        names = set(SETTINGS)
        if section["stage"] == 3:
            names = {name for name in names if not name.startswith("jvp")}
        else:
            names = {name for name in names if not name.startswith("recomputed")}
        if kind.endswith("offloaded"):
            names &= {"fd, adam", "jvp, adam", "fd, micro-batches"}
        elif kind.endswith("all levels"):
            names &= {"fd", "recomputed, mlp, cls"}
        cases += [(kind, name) for name in SETTINGS if name in names]
    return cases


@pytest.fixture(scope="module")
def plain() -> Results:
    (result,) = run_ranks(1, _run, [(PLAIN, name) for name in SETTINGS])
    return {name: rows for (_, name), rows in result.items()}


@pytest.fixture(scope="module", params=[1, 2])
def sharded(request: pytest.FixtureRequest) -> tuple[int, list[Results]]:
    return request.param, run_ranks(request.param, _run, _cases())


@pytest.mark.slow
def test_every_stage_computes_the_hypergradient_of_plain_torch(
    sharded: tuple[int, list[Results]], plain: Results
) -> None:
    world_size, ranks = sharded
    for (kind, name), rows in ranks[0].items():
        for found, expected in zip(rows, plain[name], strict=True):
            where = f"{world_size} ranks, ZeRO {kind}, {name}"
            assert found["scalars"] == pytest.approx(expected["scalars"], rel=1e-5), where
            assert found["norm"] == pytest.approx(expected["norm"], rel=1e-4), where
            error = (found["gradient"] - expected["gradient"]).norm() / expected["gradient"].norm()
            assert error < 2e-3, where  # rounding divided by the radius; jvp: below 1e-5
            cosine = F.cosine_similarity(found["gradient"], expected["gradient"], dim=0)
            assert cosine > 0.9999, where


@pytest.mark.slow
def test_weights_are_restored_bit_for_bit(sharded: tuple[int, list[Results]]) -> None:
    for results in sharded[1]:
        assert all(row["restored"] for rows in results.values() for row in rows)


@pytest.mark.slow
def test_no_rank_holds_more_of_v_than_its_shard(sharded: tuple[int, list[Results]]) -> None:
    world_size, ranks = sharded
    total = ranks[0]["0", "fd"][0]["held"]
    for results in ranks:
        for kind in ("1", "2", "3"):
            held = results[kind, "fd"][0]["held"]
            # Padding: a few numbers per parameter at most.
            assert total / world_size <= held <= 1.05 * total / world_size + 64


@pytest.mark.slow
def test_zero_3_leaves_no_weight_gathered(sharded: tuple[int, list[Results]]) -> None:
    for results in sharded[1]:
        for (kind, _), rows in results.items():
            assert all(row["empty"] is kind.startswith("3") for row in rows), kind


@pytest.mark.slow
def test_the_settings_differ(plain: Results) -> None:
    gradients: list[Tensor] = [plain[name][1]["gradient"] for name in ("fd", "fd-forward", "fd, adam")]
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-3)
    assert not torch.allclose(gradients[0], gradients[2], rtol=1e-1)
