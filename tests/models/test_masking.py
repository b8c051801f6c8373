"""Masking networks: bounded, centred, and slow to saturate."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mlomae.models import masking
from mlomae.models.masking import (
    MaskingNetwork,
    MlpMaskingNetwork,
    TokenMaskingNetwork,
    build_masking_network,
)
from mlomae.sections import MaskingConfig
from mlomae.statistics import score_statistics

GRID, WIDTH, BOUND = (3, 5), 12, 4.0
NETWORKS = ("token", "mlp")


def _build(network: str, grid: tuple[int, int] = GRID, width: int = WIDTH, hidden: int = 8) -> MaskingNetwork:
    config = MaskingConfig.model_validate({"network": network, "hidden": hidden, "logit_bound": BOUND})
    return build_masking_network(config, grid, width)


def _tokens(batch: int = 4, grid: tuple[int, int] = GRID) -> Tensor:
    return torch.randn(batch, grid[0] * grid[1], WIDTH)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("grid", [(3, 5), (5, 3), (1, 6)])
def test_scores_are_bounded_even_with_huge_weights(network: str, grid: tuple[int, int]) -> None:
    module = _build(network, grid)
    tokens = _tokens(grid=grid)
    assert module(tokens).shape == (4, grid[0] * grid[1])
    assert module(tokens).abs().max() < BOUND
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1e4)
    assert module(tokens).abs().max() <= BOUND


@pytest.mark.parametrize("network", NETWORKS)
def test_scores_are_centred_before_the_bound(network: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = _build(network).double()
    tokens = _tokens().double()
    scores = module(tokens)
    before_bound = BOUND * torch.atanh(scores / BOUND)
    torch.testing.assert_close(before_bound.mean(dim=1), torch.zeros(4, dtype=torch.float64))
    raw = module.raw_scores(tokens)
    torch.testing.assert_close(before_bound, raw - raw.mean(dim=1, keepdim=True))
    # What moves all patches of an image alike has no effect.
    monkeypatch.setattr(module, "raw_scores", lambda _: raw + 100.0)
    torch.testing.assert_close(module(tokens), scores)


@pytest.mark.parametrize("network", NETWORKS)
def test_scores_of_an_image_do_not_depend_on_the_batch(network: str) -> None:
    module, tokens = _build(network), _tokens()
    torch.testing.assert_close(module(tokens)[2:3], module(tokens[2:3]))


@pytest.mark.parametrize("network", NETWORKS)
def test_brightness_and_contrast_of_a_token_do_not_change_its_score(network: str) -> None:
    # The autoencoder's patch projection grows while it trains; the scores must not follow its size.
    module, tokens = _build(network).double(), _tokens().double()
    torch.testing.assert_close(module(50 * tokens + 3), module(tokens), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("network", NETWORKS)
def test_images_get_different_scores_at_initialisation(network: str) -> None:
    scores = _build(network, hidden=64)(_tokens(batch=32))
    statistics = score_statistics(scores, BOUND)
    # Images differ from each other nearly as much as patches within an image do.
    assert scores.std(dim=0).mean() > 0.5 * statistics["mask/spread"]
    assert statistics["mask/entropy"] > 0.95
    assert statistics["mask/saturation"] == 0


@pytest.mark.parametrize("network", NETWORKS)
def test_autocast_does_not_change_the_scores(network: str) -> None:
    built, tokens = _build(network), _tokens()
    scores = built(tokens)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(built(tokens), scores)
    assert scores.dtype == torch.float32
    assert _build(network).double()(_tokens().double()).dtype == torch.float64


@pytest.mark.parametrize("network", NETWORKS)
def test_gradient_reaches_every_weight(network: str) -> None:
    module = _build(network).double()
    (module(_tokens().double()).sigmoid() * torch.randn(4, 15)).sum().backward()
    # A weight that the centring cancels has a gradient of rounding errors only, on which Adam would walk.
    unreached = {name for name, p in module.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-9}
    assert unreached == set()


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("network", NETWORKS)
def test_every_weight_is_initialised_and_seeded(network: str) -> None:
    def build(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return _build(network).state_dict()

    first, again, other = build(1), build(1), build(2)
    assert all(value.isfinite().all() for value in first.values())
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["score.weight"], other["score.weight"])


def test_token_network_fits_any_number_of_patches() -> None:
    small, large = _build("token", (2, 3)), _build("token", (9, 7))
    large.load_state_dict(small.state_dict(), strict=True)
    assert sum(p.numel() for p in large.parameters()) == sum(p.numel() for p in small.parameters())


def test_token_network_sees_content_neighbours_image_and_position() -> None:
    module = _build("token", (5, 5)).double()
    assert isinstance(module, TokenMaskingNetwork)
    tokens = _tokens(1, (5, 5)).double()

    def raw(changed: Tensor) -> Tensor:
        return (module.raw_scores(changed) - module.raw_scores(tokens)).abs()[0].view(5, 5)

    changed = tokens.clone()
    changed[0, 12] = torch.randn(WIDTH)
    effect = raw(changed)
    near = torch.zeros(5, 5, dtype=torch.bool)
    near[1:4, 1:4] = True
    assert (effect > 0).all()  # through the mean of the image
    assert effect[near].min() > 0 and effect[2, 2] == effect.max()
    with torch.no_grad():
        module.context.weight.zero_()
    local = raw(changed)
    assert (local[near] > 0).all() and not local[~near].any()
    same_content = tokens[:, :1].expand(1, 25, -1)
    assert module(same_content).std() > 0  # positions tell equal patches apart


def test_mlp_network_has_the_papers_shape() -> None:
    with torch.device("meta"):
        module = _build("mlp", (16, 16), 768, 512)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {
        "hidden.weight": (512, 256 * 768),
        "hidden.bias": (512,),
        "score.weight": (256, 512),
        "score.bias": (256,),
    }


def test_networks_are_chosen_by_name() -> None:
    assert isinstance(_build("token"), TokenMaskingNetwork)
    assert isinstance(_build("mlp"), MlpMaskingNetwork)


class _UnscaledLinear(nn.Linear):
    """The usual layer: small weights, output as it is."""

    def __init__(self, in_features: int, out_features: int, std: float = 1.0, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)


def _saturation_after(module: MaskingNetwork, updates: int) -> tuple[float, float]:
    """Saturation and spread after Adam updates along a gradient that never changes its mind.

    Half of the positions are to be removed and half to be kept, in all images and at every update; the size
    of the gradient does not matter to Adam. The images share most of their content, as real ones do, which
    aligns the updates further.
    """
    content = 0.9 * torch.randn(1, 256, 768) + 0.44 * torch.randn(2, 256, 768)
    wanted = torch.where(torch.randperm(256) < 128, 1.0, -1.0)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, fused=True, eps=1e-12)
    for _ in range(updates):
        optimizer.zero_grad()
        (-1e-6 * module(content) * wanted).mean().backward()
        optimizer.step()
    statistics = score_statistics(module(content).detach(), BOUND)
    return statistics["mask/saturation"].item(), statistics["mask/spread"].item()


# At the paper's CIFAR size: 256 patches, 768 wide, 512 hidden (64 in the token network), rate 1e-3.
# Measured after 30 updates: saturation 0 and spread 2.1 (mlp) and 0.25 (token) of at most 4.
@pytest.mark.parametrize(
    ("network", "hidden"), [("token", 64), pytest.param("mlp", 512, marks=pytest.mark.slow)]
)
def test_thirty_aligned_updates_do_not_saturate_the_scores(network: str, hidden: int) -> None:
    module = _build(network, (16, 16), 768, hidden)
    before = score_statistics(module(torch.randn(2, 256, 768)).detach(), BOUND)["mask/spread"]
    saturation, spread = _saturation_after(module, 30)
    assert saturation < 0.01
    assert before < spread < 0.7 * BOUND  # it learns, and there is room left


def test_unscaled_layers_saturate_after_one_update(monkeypatch: pytest.MonkeyPatch) -> None:
    # Measured: 0.90 after one update and 0.99 after three, in spite of the centring and the bound.
    monkeypatch.setattr(masking, "ScaledLinear", _UnscaledLinear)
    saturation, _ = _saturation_after(_build("mlp", (16, 16), 768, 512), 1)
    assert saturation > 0.7


@pytest.mark.parametrize("in_features", [64, 4096])
def test_scaled_layer_keeps_the_size_of_its_input(in_features: int) -> None:
    x = torch.randn(256, in_features)
    assert masking.ScaledLinear(in_features, 128)(x).std().item() == pytest.approx(1, rel=0.05)
    assert masking.ScaledLinear(in_features, 128, std=0.2)(x).std().item() == pytest.approx(0.2, rel=0.05)


def _growth(make: Callable[[int], nn.Module], width: int) -> float:
    """Change of the output after one update of size 1e-3 per weight, aligned with the input."""
    layer, x = make(width), torch.randn(1, width)
    before = layer(x)
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.ndim == 2:
                parameter.add_(1e-3 * x.sign())
    return (layer(x) - before).mean().item()


def test_one_update_of_a_scaled_layer_grows_with_the_root_of_its_width() -> None:
    scaled = [_growth(lambda n: masking.ScaledLinear(n, 4), width) for width in (100, 10000)]
    usual = [_growth(lambda n: nn.Linear(n, 4), width) for width in (100, 10000)]
    assert scaled[1] / scaled[0] == pytest.approx(10, rel=0.2)
    assert usual[1] / usual[0] == pytest.approx(100, rel=0.2)
