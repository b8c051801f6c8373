"""FLOPs from the configuration, against torch's counter on real trainers and against published figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count, sdpa_flop_count

from mlomae import objectives
from mlomae.config import Config
from mlomae.distributed.env import join_world
from mlomae.flops import decoder, iteration_flops, masked_encoder, pretrain_flops, whole_encoder
from mlomae.hypergradient import Hypergradient
from mlomae.levels import HardnessLevel, HeadLevel, MaskLevel, PretrainLevel
from mlomae.mlo import direction as direction_module
from mlomae.models.attention import using_attention
from mlomae.models.mae import MaskedAutoencoder
from mlomae.models.selection import MaskPolicy
from mlomae.run_dir import RunDir
from mlomae.trainer import Trainer
from mlomae_kernels.ops import linear
from tests.data.made_scenes import write_scenes
from tests.integration.tiny import tiny_config

NUM_CLASSES = 10
SMALL = {
    "model.arch": "vit_pico", "model.img_size": [8, 16], "model.patch_size": 4, "model.in_chans": 2,
    "model.decoder_dim": 24, "model.decoder_depth": 3, "model.decoder_heads": 2, "masking.ratio": 0.6,
}  # fmt: skip


@pytest.fixture(autouse=True)
def countable_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's counter does not know oneDNN's products."""
    monkeypatch.setattr(linear, "one_dnn_pays", lambda: False)


class _Total:
    """In place of the tracker that splits the count by module: its hooks cannot be combined with
    ``torch.autograd.grad`` of a leaf, and only the total is of interest."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


Shape = tuple[int, ...]


def _attention_flops(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    return sdpa_flop_count(query, key, value)


def _attention_backward_flops(
    grad: Shape, query: Shape, key: Shape, value: Shape, *_: object, **__: object
) -> int:
    # Fused attention computes its scores again: execution, not model.
    return 2 * sdpa_flop_count(query, key, value)


def _convolution_backward_flops(grad: Shape, x: Shape, weight: Shape, *rest: Any, **__: object) -> int:
    # torch's own formula takes the gradient of a grouped convolution's weight for that of a dense one.
    output_mask = rest[-1]
    return sum(output_mask[:2]) * conv_flop_count(list(x), list(weight), list(grad))


@contextmanager
def _counting() -> Iterator[Callable[[], int]]:
    """Yields what tells the FLOPs since the beginning."""
    aten = torch.ops.aten
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
            aten.convolution_backward: _convolution_backward_flops,
        },
    )
    counter.mod_tracker = _Total()  # type: ignore[assignment]
    with counter:
        yield counter.get_total_flops


@pytest.mark.parametrize("attention", ["reference", "fused"])
@pytest.mark.parametrize("predict", ["removed", "all"])
@pytest.mark.parametrize("fields", [{}, SMALL], ids=["tiny", "small"])
def test_pretrain_step_is_counted_exactly(fields: dict[str, Any], predict: str, attention: str) -> None:
    config = tiny_config({**fields, "model.predict": predict})
    module = MaskedAutoencoder(config.model)
    images = torch.randn(3, config.model.in_chans, *config.model.size)
    policy = MaskPolicy(config.masking, config.model.grid, config.num_keep, seed=0)
    scores = torch.randn(3, config.model.num_patches)
    selection = policy.select(scores, 3, 0, 0, images.device)
    with using_attention(module, attention), _counting() as flops:
        objectives.pretrain_loss(module(images, selection), selection.mask, None).backward()
        assert flops() == 3 * pretrain_flops(config)


@pytest.mark.parametrize("pool", ["cls", "mean", "cls+mean"])
def test_whole_encoder_is_counted_exactly(pool: str) -> None:
    config = tiny_config({**SMALL, "model.pool": pool})
    encoder = MaskedAutoencoder(config.model).encoder
    images = torch.randn(3, config.model.in_chans, *config.model.size)
    with torch.no_grad(), _counting() as flops:
        encoder(images, pool=pool)
        assert flops() == 3 * whole_encoder(config.model, pool).forward
    with _counting() as flops:
        encoder(images, pool=pool).sum().backward()
        assert flops() == 3 * whole_encoder(config.model, pool).training


@pytest.mark.parametrize(("arch", "giga"), [("vit_base", 17.6), ("vit_large", 61.6)])
def test_whole_encoder_agrees_with_published_figures(arch: str, giga: float) -> None:
    # Multiply-adds of ViT-B/16 and ViT-L/16 at 224 x 224 pixels: Liu et al., "A ConvNet for the 2020s", 2022.
    config = Config.model_validate({"model": {"arch": arch, "pool": "mean"}})
    assert whole_encoder(config.model, config.model.pool).forward / 2e9 == pytest.approx(giga, rel=3e-3)


class _Parts:
    """Attributes FLOPs to parts: those of a call belong to its own part, without the watched calls inside."""

    def __init__(self, flops: Callable[[], int]) -> None:
        self.found: Counter[str] = Counter()
        self._flops = flops
        self._stack = ["pretrain"]
        self._mark = 0

    def settle(self) -> None:
        """Attributes everything since the last call to the part that is under way."""
        now = self._flops()
        self.found[self._stack[-1]] += now - self._mark
        self._mark = now

    def watch(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, part: str) -> None:
        function = getattr(owner, name)

        def watched(*arguments: Any, **named: Any) -> Any:
            self.settle()
            # The direction's own features belong to it.
            self._stack.append("direction" if part == "features" and "direction" in self._stack else part)
            try:
                return function(*arguments, **named)
            finally:
                self.settle()
                self._stack.pop()

        monkeypatch.setattr(owner, name, watched)


WATCHED: dict[str, list[tuple[Any, str]]] = {
    "masking": [(PretrainLevel, "mask")],
    "direction": [(Hypergradient, "direction")],
    "influence": [(Hypergradient, "influence")],
    "features": [(Hypergradient, "features")],
    "head": [(HeadLevel, "step"), (direction_module, "feature_cotangents")],
    "mask": [(MaskLevel, "step"), (HardnessLevel, "step")],
}


def _spent(config: Config, monkeypatch: pytest.MonkeyPatch, folder: Path) -> dict[str, float]:
    """FLOPs of an average outer iteration of a trainer by part; parts without any are absent."""
    trainer = Trainer(config, RunDir(folder, config), join_world("cpu"), None)
    every = config.hypergradient.every
    with _counting() as flops:
        parts = _Parts(flops)
        for part, functions in WATCHED.items():
            for owner, name in functions:
                parts.watch(monkeypatch, owner, name, part)
        for number in range(every):
            trainer.iterate(number)
        parts.settle()
    trainer.loaders.close()
    return {part: count / every for part, count in parts.found.items() if count}


def _config(fields: dict[str, Any]) -> Config:
    base = {"model.decoder_depth": 2, "masking.hidden": 16, "hypergradient.check_every": 0}
    return tiny_config({**base, **fields})


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"model.pool": "cls", "hypergradient.every": 3},
        {"model.pool": "cls+mean", "model.predict": "all"},
        {"levels": 2, "mask.batch_size": 12},
        {"masking.network": "mlp", "pretrain.unroll_steps": 3},
        {"masking.policy": "weighted-random", "head.batch_size": 12},
        {"hypergradient.share": 0.4, "pretrain.batch_size": 9},
        {"hypergradient.check_every": 1, "hypergradient.radius": 1e-4},
        {"hypergradient.estimator": "fd-forward"},
        {"hypergradient.estimator": "fd-forward", "hypergradient.precision": "float32"},
        {"hypergradient.estimator": "exact"},
        {"masking.policy": "random"},
        {"masking.policy": "hard"},
        {"pretrain.label_weight": 0.5},
        {"masking.policy": "hard", "masking.network": "mlp", "pretrain.label_weight": 0.5},
    ],
    ids=lambda fields: ",".join(f"{name.split('.')[-1]}={value}" for name, value in fields.items()) or "fd",
)
def test_iteration_is_counted_by_part(
    fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = _config(fields)
    expected = iteration_flops(config, NUM_CLASSES)
    assert _spent(config, monkeypatch, tmp_path) == pytest.approx(
        {part: flops for part, flops in expected.items() if flops}, rel=0.01
    )


@pytest.mark.parametrize("levels", [2, 3])
def test_a_head_of_pixels_is_counted_by_patches(
    levels: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_scenes(tmp_path, "training", 60)
    write_scenes(tmp_path, "validation", 1, first=100)
    config = _config(
        {
            "levels": levels, "model.pool": "cls", "model.img_size": [16, 24], "model.in_chans": 3,
            "data.dataset": "scenes", "data.path": str(tmp_path), "data.num_classes": 3, "data.void": [7],
        }
    )  # fmt: skip
    expected = iteration_flops(config, 3)
    assert _spent(config, monkeypatch, tmp_path) == pytest.approx(
        {part: flops for part, flops in expected.items() if flops}, rel=0.01
    )


def test_forward_mode_needs_no_tangent_of_what_does_not_move(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config = _config({"hypergradient.estimator": "jvp"})
    encoder, rest = masked_encoder(config), decoder(config)
    images = config.pretrain.batch_size
    # torch multiplies the zero tangents of constant weights and inputs too: three products everywhere.
    spent = _spent(config, monkeypatch, tmp_path)["influence"]
    assert spent == pytest.approx(images * (encoder + rest).times(3, 3, 3), rel=0.01)
    saved = images * (encoder.first + rest.linear)
    assert iteration_flops(config)["influence"] == images * (encoder + rest).times(3, 3, 3) - saved


def test_estimator_in_use_replaces_the_configured_one() -> None:
    config = _config({})
    assert iteration_flops(config) == iteration_flops(config, estimator="fd")
    named = iteration_flops(_config({"hypergradient.estimator": "jvp"}))
    assert iteration_flops(config, estimator="jvp") == named


def test_checks_of_the_radius_cost_two_differences_each() -> None:
    plain, checked = (_config({"hypergradient.check_every": every}) for every in (0, 10))
    expected = 1.2 * iteration_flops(plain)["influence"]
    assert iteration_flops(checked)["influence"] == pytest.approx(expected, rel=1e-12)
    # Forward mode has no radius.
    assert iteration_flops(checked, estimator="jvp") == iteration_flops(plain, estimator="jvp")


def test_policy_without_a_masking_network_has_one_part() -> None:
    config = _config({"masking.policy": "block"})
    images = config.pretrain.unroll_steps * config.pretrain.batch_size
    assert iteration_flops(config, NUM_CLASSES) == {"pretrain": images * pretrain_flops(config)}
