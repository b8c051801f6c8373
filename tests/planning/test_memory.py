"""The plan's memory against real outer iterations, and its parameters against real modules."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlomae.models.head import ClassifierHead
from mlomae.models.mae import MaskedAutoencoder
from mlomae.models.masking import build_masking_network
from mlomae.planning import parameters
from mlomae.planning.activations import Layer, peak
from tests.integration.tiny import tiny_config
from tests.planning.measured import CASES, SMALL, measure


@pytest.mark.parametrize("case", CASES)
def test_prediction_is_within_a_tenth_of_the_measured_peak(case: str, tmp_path: Path) -> None:
    found, memory = measure(tmp_path, CASES[case])
    assert memory.worst().beyond == pytest.approx(found, rel=0.1)


@pytest.mark.parametrize("network", ["token", "mlp"])
def test_parameters_are_those_of_the_modules(network: str) -> None:
    config = tiny_config({**SMALL, "masking.network": network, "data.path": "nowhere"})
    labelled = tiny_config({**SMALL, "pretrain.label_weight": 1, "data.path": "nowhere"})
    model = config.model
    width = 96
    modules = {
        MaskedAutoencoder(model): parameters.encoder(model) + parameters.decoder(model),
        ClassifierHead(width, 7): parameters.label_classifier(labelled, 7),
        ClassifierHead(width, 7): parameters.head(config, 7),
        build_masking_network(config.masking, model.grid, width): parameters.masking_network(config),
    }
    for module, weights in modules.items():
        sizes = sorted(p.numel() for p in module.parameters() if p.requires_grad)
        assert sorted(weights.tensors) == sizes


def test_the_worst_moment_of_a_pass_counts_what_is_kept_and_what_was_made() -> None:
    first, last = Layer(10, 100, 0, 1, 0), Layer(20, 50, 5, 2, 0)
    assert peak([first, last]) == (11, 150)
    assert peak([first, last], gradients=False) == (11, 100)
    assert peak([Layer(10, 0, 0, 1, 0), Layer(20, 0, 50, 2, 0)]) == (80, 0)
