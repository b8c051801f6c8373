"""The encoder is a timm VisionTransformer: same names, same shapes, same features."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mlomae.memory import peak_bytes
from mlomae.models.encoder import ViTEncoder, pool_features, sincos_positions
from mlomae.models.head import ClassifierHead

# timm's name, ours, image size, patch size
TIMM_TWINS = [
    ("vit_tiny_patch16_224", "vit_tiny", 224, 16),
    ("vit_small_patch16_224", "vit_small", 224, 16),
    ("vit_base_patch16_224", "vit_base", 224, 16),
    ("vit_large_patch16_224", "vit_large", 224, 16),
    ("vit_huge_patch14_224", "vit_huge", 224, 14),
]


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


@pytest.mark.parametrize(("timm_name", "arch", "size", "patch_size"), TIMM_TWINS)
def test_state_dict_is_that_of_timm(timm_name: str, arch: str, size: int, patch_size: int) -> None:
    with torch.device("meta"):
        ours = ViTEncoder(arch, (size, size), patch_size, 3)
        twin = timm.create_model(timm_name, num_classes=0)
    assert _shapes(ours) == _shapes(twin)
    twin.load_state_dict(ours.state_dict(), strict=True, assign=True)


def test_papers_cifar_model_has_256_patches_and_timm_state_dict() -> None:
    with torch.device("meta"):
        ours = ViTEncoder("vit_base", (32, 32), 2, 3)
        twin = timm.create_model("vit_base_patch16_224", img_size=32, patch_size=2, num_classes=0)
    assert _shapes(ours) == _shapes(twin)
    assert _shapes(ours)["pos_embed"] == (1, 257, 768)
    assert _shapes(ours)["patch_embed.proj.weight"] == (768, 3, 2, 2)


@pytest.mark.parametrize("size", [(32, 32), (16, 48), (40, 24)])
def test_features_equal_timms_after_a_strict_load(size: tuple[int, int]) -> None:
    ours = ViTEncoder("vit_tiny", size, 8, 3)
    twin = timm.create_model("vit_tiny_patch16_224", img_size=size, patch_size=8, num_classes=0)
    assert isinstance(twin, VisionTransformer)
    twin.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        tokens = ours.eval()(images)
        torch.testing.assert_close(tokens, twin.eval().forward_features(images), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(pool_features(tokens, "cls"), twin(images), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("size", "patch_size", "channels"), [((8, 24), 4, 1), ((15, 21), 3, 3), ((4, 28), 4, 2)]
)
def test_any_grid_encodes_all_patches_like_no_selection(
    size: tuple[int, int], patch_size: int, channels: int
) -> None:
    encoder = ViTEncoder("vit_pico", size, patch_size, channels)
    images = torch.randn(3, channels, *size)
    patches = size[0] * size[1] // patch_size**2
    everything = torch.arange(patches).expand(3, -1)
    tokens = encoder(images)
    assert tokens.shape == (3, 1 + patches, encoder.embed_dim)
    torch.testing.assert_close(encoder(images, everything), tokens, rtol=1e-6, atol=1e-6)


def test_order_of_the_kept_patches_does_not_matter() -> None:
    encoder = ViTEncoder("vit_pico", (8, 12), 2, 3)
    images = torch.randn(4, 3, 8, 12)
    ids = torch.stack([torch.randperm(24)[:9] for _ in range(4)])
    order = torch.randperm(9)
    tokens, shuffled = encoder(images, ids), encoder(images, ids[:, order])
    torch.testing.assert_close(shuffled[:, 0], tokens[:, 0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shuffled[:, 1:], tokens[:, 1:][:, order], rtol=1e-5, atol=1e-5)


def test_removed_patches_do_not_reach_the_encoder() -> None:
    encoder = ViTEncoder("vit_pico", (8, 8), 2, 3)
    images = torch.randn(1, 3, 8, 8)
    ids = torch.tensor([[0, 1, 2, 3]])  # the first row of patches
    changed = images.clone()
    changed[:, :, 2:] = 99.0
    assert torch.equal(encoder(changed, ids), encoder(images, ids))
    assert not torch.equal(encoder(changed), encoder(images))


@pytest.mark.parametrize("grid", [(4, 4), (3, 7), (1, 5)])
def test_positions_follow_the_formula(grid: tuple[int, int]) -> None:
    dim = 16
    table = sincos_positions(grid, dim, prefix=1)[0].numpy()
    expected = np.zeros((1 + grid[0] * grid[1], dim))
    for row in range(grid[0]):
        for column in range(grid[1]):
            rates = [10000 ** (-4 * i / dim) for i in range(dim // 4)]
            expected[1 + row * grid[1] + column] = [
                wave(place * rate)
                for wave in (math.sin, math.cos)
                for place in (row, column)
                for rate in rates
            ]
    np.testing.assert_allclose(table, expected, atol=1e-6)
    assert len({tuple(line.round(5)) for line in table}) == len(table)  # every place has its own


def test_positions_of_the_encoder_are_fixed_and_the_class_token_has_none() -> None:
    encoder = ViTEncoder("vit_pico", (6, 10), 2, 3)
    assert not encoder.pos_embed.requires_grad
    assert torch.equal(encoder.pos_embed, sincos_positions((3, 5), encoder.embed_dim, prefix=1))
    assert not encoder.pos_embed[:, 0].any()
    trainable = {name for name, p in encoder.named_parameters() if p.requires_grad}
    assert trainable == {name for name, _ in encoder.named_parameters()} - {"pos_embed"}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("arch", ["vit_pico", "vit_micro", "vit_tiny"])
def test_every_weight_is_initialised(arch: str) -> None:
    modules = (ViTEncoder(arch, (12, 8), 4, 3), ClassifierHead(32, 10))
    values = {name: v for module in modules for name, v in module.state_dict().items()}
    assert {name for name, value in values.items() if not value.isfinite().all()} == set()


def test_initial_weights_are_those_of_mae() -> None:
    encoder = ViTEncoder("vit_micro", (32, 32), 4, 3)
    for name, module in encoder.named_modules():
        if isinstance(module, nn.Linear):
            _check_xavier(name, module.weight)
            assert not module.bias.any(), name
    _check_xavier("patch_embed", encoder.patch_embed.proj.weight.flatten(1))
    assert 0.01 < encoder.cls_token.std() < 0.03


def _check_xavier(name: str, weight: Tensor) -> None:
    bound = math.sqrt(6 / sum(weight.shape))
    assert weight.abs().max() <= bound, name
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1), name


def test_a_seed_fixes_the_weights_and_another_changes_them() -> None:
    def build(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return ViTEncoder("vit_pico", (8, 8), 2, 3).state_dict()

    first, again, other = build(1), build(1), build(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["patch_embed.proj.weight"], other["patch_embed.proj.weight"])
    assert not torch.equal(first["cls_token"], other["cls_token"])


def test_pooling_reads_the_class_token_or_the_patches() -> None:
    tokens = torch.arange(24.0).view(2, 4, 3)
    assert torch.equal(pool_features(tokens, "cls"), tokens[:, 0])
    mean = (tokens[:, 1] + tokens[:, 2] + tokens[:, 3]) / 3
    assert torch.equal(pool_features(tokens, "mean"), mean)
    assert torch.equal(pool_features(tokens, "cls+mean"), torch.cat([tokens[:, 0], mean], dim=1))


@pytest.mark.parametrize("pool", ["cls", "mean", "cls+mean"])
def test_features_and_their_gradients_are_those_of_the_tokens(pool: str) -> None:
    encoder = ViTEncoder("vit_micro", (8, 8), 2, 3).double()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    weights = [p for p in encoder.parameters() if p.requires_grad]
    expected, found = pool_features(encoder(images), pool), encoder(images, pool=pool)
    torch.testing.assert_close(found, expected)
    cotangent = torch.randn_like(expected)
    gradients = [torch.autograd.grad(features, weights, cotangent) for features in (found, expected)]
    torch.testing.assert_close(*gradients)
    with torch.no_grad():
        torch.testing.assert_close(encoder(images, pool=pool), expected)


def test_features_keep_less_for_their_backward_pass_than_tokens_do() -> None:
    encoder = ViTEncoder("vit_micro", (16, 16), 2, 3)
    images = torch.randn(8, 3, 16, 16)
    weights = [p for p in encoder.parameters() if p.requires_grad]

    def peak(features: Callable[[], Tensor]) -> int:
        return peak_bytes(lambda: torch.autograd.grad(features().sum(), weights), torch.device("cpu"))

    lean, usual = peak(lambda: encoder(images, pool="mean")), peak(lambda: encoder(images)[:, 1:].mean(1))
    assert lean < 0.75 * usual  # measured 0.67
