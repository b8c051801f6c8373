"""The masked autoencoder: shapes, errors and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mlomae_kernels
from mlomae.models.encoder import sincos_positions
from mlomae.models.mae import Decoder, MaskedAutoencoder
from mlomae.models.selection import PatchSelection
from mlomae.sections import ModelConfig
from mlomae_kernels.ops import linear


def _config(size: tuple[int, int] = (8, 12), patch_size: int = 2, norm_pix: bool = True) -> ModelConfig:
    return ModelConfig(
        arch="vit_pico", img_size=size, patch_size=patch_size, decoder_dim=32, decoder_depth=1,
        decoder_heads=2, norm_pix=norm_pix,
    )  # fmt: skip


def _selection(batch: int, patches: int, keep: int) -> PatchSelection:
    return PatchSelection(*mlomae_kernels.select_patches(torch.rand(batch, patches), keep))


def test_default_decoder_is_512_wide_and_8_deep() -> None:
    with torch.device("meta"):
        decoder = Decoder(ModelConfig(), 768)
    assert len(decoder.blocks) == 8
    assert decoder.embed.weight.shape == (512, 768)
    assert decoder.pos_embed.shape == (1, 197, 512)
    assert decoder.pred.weight.shape == (768, 512)
    assert {block.attn.num_heads for block in decoder.blocks if isinstance(block, Block)} == {16}
    assert not decoder.pos_embed.requires_grad


def test_decoder_positions_are_the_grids() -> None:
    decoder = Decoder(_config((6, 10)), 64)
    assert torch.equal(decoder.pos_embed, sincos_positions((3, 5), 32, prefix=1))


@pytest.mark.parametrize("norm_pix", [False, True])
def test_errors_are_the_mean_squares_of_the_removed_patches(norm_pix: bool) -> None:
    module = MaskedAutoencoder(_config(norm_pix=norm_pix))
    images, selection = torch.randn(3, 3, 8, 12), _selection(3, 24, 6)
    errors = module(images, selection)
    prediction = module.reconstruct(images, selection)
    assert prediction.shape == (3, 24, 12)
    for image in range(3):
        for patch in range(24):
            row, column = divmod(patch, 6)
            target = images[image, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
            target = target.permute(1, 2, 0).flatten()
            if norm_pix:
                target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
            expected = ((prediction[image, patch] - target) ** 2).mean()
            if selection.mask[image, patch] == 0:
                expected = torch.zeros(())
            torch.testing.assert_close(errors[image, patch], expected)
    assert torch.equal(errors == 0, selection.mask == 0)


@pytest.mark.parametrize(("size", "patch_size"), [((8, 24), 4), ((15, 21), 3), ((4, 28), 4)])
def test_non_square_images_and_odd_grids(size: tuple[int, int], patch_size: int) -> None:
    module = MaskedAutoencoder(_config(size, patch_size))
    patches = size[0] * size[1] // patch_size**2
    selection = _selection(2, patches, patches // 3)
    errors = module(torch.randn(2, 3, *size), selection)
    assert errors.shape == (2, patches)
    assert torch.equal(errors > 0, selection.mask == 1)


@pytest.mark.parametrize("keep", [1, 23])
def test_extreme_ratios(keep: int) -> None:
    errors = MaskedAutoencoder(_config())(torch.randn(2, 3, 8, 12), _selection(2, 24, keep))
    assert torch.equal((errors > 0).sum(dim=1), torch.full((2,), 24 - keep))


def test_gradient_reaches_every_trainable_parameter() -> None:
    module = MaskedAutoencoder(_config())
    module(torch.randn(4, 3, 8, 12), _selection(4, 24, 6)).sum().backward()
    unreached = {
        n for n, p in module.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())
    }
    assert unreached == set()
    frozen = {name for name, p in module.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.pos_embed", "decoder.pos_embed"}


def test_reconstruction_does_not_read_removed_pixels() -> None:
    module = MaskedAutoencoder(_config())
    images, selection = torch.randn(2, 3, 8, 12), _selection(2, 24, 6)
    removed = selection.mask.view(2, 1, 4, 6).repeat_interleave(2, 2).repeat_interleave(2, 3)
    changed = torch.where(removed == 1, torch.full_like(images, 7.0), images)
    assert torch.equal(module.reconstruct(changed, selection), module.reconstruct(images, selection))


def test_errors_are_those_of_each_image_alone() -> None:
    module = MaskedAutoencoder(_config())
    images, selection = torch.randn(3, 3, 8, 12), _selection(3, 24, 6)
    alone = PatchSelection(selection.ids_keep[1:2], selection.ids_restore[1:2], selection.mask[1:2])
    torch.testing.assert_close(module(images, selection)[1:2], module(images[1:2], alone))


def test_loss_is_taken_in_the_precision_of_the_images() -> None:
    module, images, selection = MaskedAutoencoder(_config()), torch.randn(2, 3, 8, 12), _selection(2, 24, 6)
    with torch.autocast("cpu", torch.bfloat16):
        assert module.reconstruct(images, selection).dtype == torch.bfloat16
        assert module(images, selection).dtype == torch.float32
    assert module.double()(images.double(), selection).dtype == torch.float64


@pytest.mark.usefixtures("poisoned_memory")
def test_every_weight_is_initialised() -> None:
    values = MaskedAutoencoder(_config()).state_dict()
    assert {name for name, value in values.items() if not value.isfinite().all()} == set()


def test_a_seed_fixes_the_weights() -> None:
    def build(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return MaskedAutoencoder(_config()).state_dict()

    first, again, other = build(3), build(3), build(4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["decoder.mask_token"], other["decoder.mask_token"])


@pytest.mark.parametrize("norm_pix", [False, True])
def test_predicting_removed_patches_only_changes_no_error_and_no_gradient(norm_pix: bool) -> None:
    module = MaskedAutoencoder(_config(norm_pix=norm_pix)).double()
    images, selection = torch.randn(3, 3, 8, 12, dtype=torch.float64), _selection(3, 24, 6)
    weights = [p for p in module.parameters() if p.requires_grad]
    cotangent = torch.randn(3, 24, dtype=torch.float64)
    results = []
    for module.predicts_all in (True, False):
        errors = module(images, selection)
        results.append((errors, torch.autograd.grad(errors, weights, cotangent)))
    torch.testing.assert_close(*results)


def test_removed_patches_are_those_that_are_not_kept() -> None:
    selection = _selection(5, 24, 6)
    assert selection.ids_removed.shape == (5, 18)
    removed = torch.zeros(5, 24).scatter(1, selection.ids_removed, 1.0)
    assert torch.equal(removed, selection.mask)


def test_features_take_no_product_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = []
    for pays in (False, True):
        monkeypatch.setattr(linear, "one_dnn_pays", lambda pays=pays: pays)
        encoder, images = MaskedAutoencoder(_config()).encoder, torch.randn(32, 3, 8, 12)
        with _Products() as products:
            encoder(images, pool="mean").sum().backward()
        counts.append(products.taken)
    # Forward, and both gradients, of four layers in each block.
    assert counts == [12 * len(encoder.blocks)] * 2


class _Products(TorchDispatchMode):
    taken = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.taken += func.overloadpacket.__name__ in ("addmm", "mm", "_linear_pointwise")
        return func(*args, **(kwargs or {}))
