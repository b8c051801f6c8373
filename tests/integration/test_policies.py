"""All mask policies train through the same code, and only those with a hypergradient have upper levels."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from mlomae import checkpoint
from mlomae.distributed.env import join_world
from mlomae.run_dir import RunDir
from mlomae.trainer import Trainer
from tests.integration.tiny import Fields, read_metrics, tiny_config, train, without_pictures

# The levels of each.
POLICIES = {
    "learned": {"pretrain", "head", "mask"},
    "weighted-random": {"pretrain", "head", "mask"},
    "hard": {"pretrain", "hardness"},
    "random": {"pretrain"},
    "fixed": {"pretrain"},
    "block": {"pretrain"},
}
VARIANTS = list(itertools.product(("token", "mlp"), ("gumbel", "topk")))


def run(folder: Path, fields: Fields) -> tuple[Trainer, list[dict[str, Any]]]:
    trainer = train(tiny_config({"run_dir": folder, "iterations": 3, **fields}))
    return trainer, read_metrics(folder)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_trains_with_every_network_and_selection(
    policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pictures(monkeypatch)
    names = POLICIES[policy]
    curves = {}
    for network, selection in VARIANTS:
        folder = tmp_path / f"{network}-{selection}"
        fields = {"masking.policy": policy, "masking.network": network, "masking.selection": selection}
        trainer, rows = run(folder, fields)

        assert [row["step"] for row in rows] == [1, 2, 3]
        assert trainer.levels.by_name().keys() == names
        path = checkpoint.newest(folder / "checkpoints")
        assert path is not None
        loaded = checkpoint.read(path)
        assert {name.split(".")[0] for name in loaded.tensors} == names
        assert loaded.state["streams"].keys() == names - {"hardness"}
        losses = {name for name in rows[-1] if name.startswith("loss/")}
        assert losses == {"loss/reconstruction"} | {f"loss/{name}" for name in names}
        assert sum(rows[-1]["mask/frequency"]) == pytest.approx(8)  # of 16 patches, at ratio 0.5
        curves[network, selection] = rows

    token, topk = curves["token", "gumbel"], curves["token", "topk"]
    # An option that a policy does not use changes nothing; one that it uses does.
    assert (curves["mlp", "gumbel"] == token) == (names == {"pretrain"})
    assert (topk == token) == (policy != "learned")


def test_all_policies_start_from_the_same_autoencoder() -> None:
    states = {}
    for policy in POLICIES:
        config = tiny_config({"masking.policy": policy, "seed": 5})
        trainer = Trainer(config, RunDir(config.run_dir, config), join_world("cpu"), None)
        states[policy] = trainer.levels.pretrain.autoencoder.state_dict()
    other = tiny_config({"seed": 6})
    different = Trainer(other, RunDir(other.run_dir, other), join_world("cpu"), None)

    first = states["learned"]
    for state in states.values():
        assert state.keys() == first.keys()
        assert all(torch.equal(state[name], first[name]) for name in first)
    unequal = different.levels.pretrain.autoencoder.state_dict()
    assert not torch.equal(
        unequal["encoder.patch_embed.proj.weight"], first["encoder.patch_embed.proj.weight"]
    )


def test_masks_follow_the_policy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)
    agreement = {}
    for policy in ("random", "fixed"):
        _, rows = run(tmp_path / policy, {"masking.policy": policy, "pretrain.batch_size": 64})
        agreement[policy] = [row["mask/agreement"] for row in rows]
        frequencies = [row["mask/frequency"] for row in rows]
        if policy == "fixed":
            assert set(frequencies[0]) == {0.0, 1.0}
            assert frequencies[0] == frequencies[1] == frequencies[2]

    assert agreement["fixed"] == [1.0, 1.0, 1.0]
    assert agreement["random"] == pytest.approx([0.5] * 3, abs=0.03)
