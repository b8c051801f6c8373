"""patch_gather and patch_scatter against explicit loops; derivatives; their inverse relation."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import mlomae_kernels as ops

_SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 50), st.integers(1, 5))


def _selection(batch: int, patches: int, num_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    return ops.select_patches(torch.rand(batch, patches), num_keep)


@pytest.mark.parametrize("with_pos", [True, False])
@pytest.mark.parametrize("with_cls", [True, False])
@pytest.mark.parametrize(
    ("batch", "patches", "num_keep", "width"), [(1, 1, 1, 1), (2, 49, 12, 3), (3, 7, 0, 5)]
)
def test_gather_is_a_loop_over_kept_patches(
    with_pos: bool, with_cls: bool, batch: int, patches: int, num_keep: int, width: int
) -> None:
    tokens, ids_keep = torch.randn(batch, patches, width), _selection(batch, patches, num_keep)[0]
    pos = torch.randn(1, patches, width) if with_pos else None
    cls = torch.randn(1, 1, width) if with_cls else None
    actual = ops.patch_gather(tokens, pos, ids_keep, cls)
    assert actual.shape == (batch, num_keep + with_cls, width)
    for row in range(batch):
        if cls is not None:
            assert torch.equal(actual[row, 0], cls[0, 0])
        for slot, patch in enumerate(ids_keep[row].tolist()):
            token = tokens[row, patch] if pos is None else tokens[row, patch] + pos[0, patch]
            assert torch.equal(actual[row, slot + with_cls], token)


@pytest.mark.parametrize(
    ("batch", "patches", "num_keep", "width"), [(1, 1, 1, 1), (2, 49, 12, 3), (3, 7, 0, 5), (2, 6, 6, 4)]
)
def test_scatter_is_a_loop_over_all_patches(batch: int, patches: int, num_keep: int, width: int) -> None:
    ids_keep, ids_restore, _ = _selection(batch, patches, num_keep)
    latent, mask_token = torch.randn(batch, 1 + num_keep, width), torch.randn(1, 1, width)
    pos = torch.randn(1, 1 + patches, width)
    actual = ops.patch_scatter(latent, mask_token, ids_restore, pos)
    assert actual.shape == (batch, 1 + patches, width)
    for row in range(batch):
        assert torch.equal(actual[row, 0], latent[row, 0] + pos[0, 0])
        kept = ids_keep[row].tolist()
        for patch in range(patches):
            token = latent[row, 1 + kept.index(patch)] if patch in kept else mask_token[0, 0]
            assert torch.equal(actual[row, 1 + patch], token + pos[0, 1 + patch])


@given(shape=_SHAPES, data=st.data())
def test_scatter_undoes_gather_on_kept_patches(shape: tuple[int, int, int], data: st.DataObject) -> None:
    batch, patches, width = shape
    num_keep = data.draw(st.integers(0, patches))
    ids_keep, ids_restore, mask = _selection(batch, patches, num_keep)
    tokens, cls, mask_token = torch.randn(shape), torch.randn(1, 1, width), torch.full((1, 1, width), 7.0)
    visible = ops.patch_gather(tokens, None, ids_keep, cls)
    actual = ops.patch_scatter(visible, mask_token, ids_restore, torch.zeros(1, 1 + patches, width))
    assert torch.equal(actual[:, 1:], torch.where(mask.unsqueeze(-1) > 0, mask_token, tokens))
    assert torch.equal(actual[:, :1], cls.expand(batch, -1, -1))


@given(shape=_SHAPES, data=st.data())
def test_gather_follows_a_permutation_of_the_patches(
    shape: tuple[int, int, int], data: st.DataObject
) -> None:
    batch, patches, _ = shape
    scores, tokens, shuffle = torch.rand(batch, patches), torch.randn(shape), torch.randperm(patches)
    num_keep = data.draw(st.integers(1, patches))
    plain = ops.patch_gather(tokens, None, ops.select_patches(scores, num_keep)[0], None)
    ids_keep = ops.select_patches(scores[:, shuffle], num_keep)[0]
    assert torch.equal(ops.patch_gather(tokens[:, shuffle], None, ids_keep, None), plain)


def _double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_gather_derivatives() -> None:
    ids_keep = _selection(2, 7, 3)[0]
    inputs = (_double(2, 7, 3), _double(1, 7, 3), _double(1, 1, 3))

    def visible(tokens: Tensor, pos: Tensor, cls: Tensor) -> Tensor:
        return ops.patch_gather(tokens, pos, ids_keep, cls).sin()

    assert gradcheck(visible, inputs, check_forward_ad=True)
    assert gradgradcheck(visible, inputs)


def test_scatter_derivatives() -> None:
    ids_restore = _selection(2, 7, 3)[1]
    inputs = (_double(2, 4, 3), _double(1, 1, 3), _double(1, 8, 3))

    def decoder_input(latent: Tensor, mask_token: Tensor, pos: Tensor) -> Tensor:
        return ops.patch_scatter(latent, mask_token, ids_restore, pos).sin()

    assert gradcheck(decoder_input, inputs, check_forward_ad=True)
    assert gradgradcheck(decoder_input, inputs)


def test_gradient_reaches_kept_tokens_only() -> None:
    tokens, (ids_keep, _, mask) = _double(2, 9, 4), _selection(2, 9, 3)
    cotangent = torch.randn(4, 3, 2, dtype=torch.float64).permute(2, 1, 0)  # not contiguous
    ops.patch_gather(tokens, None, ids_keep, None).backward(cotangent)
    assert tokens.grad is not None
    assert torch.equal(tokens.grad[mask > 0], torch.zeros(12, 4, dtype=torch.float64))
    for row in range(2):
        assert torch.equal(tokens.grad[row, ids_keep[row]], cotangent[row])


def test_low_precision_moves_bits_unchanged() -> None:
    ids_keep, ids_restore, mask = _selection(2, 9, 3)
    tokens, cls = torch.randn(2, 9, 4).bfloat16(), torch.zeros(1, 1, 4).bfloat16()
    visible = ops.patch_gather(tokens, None, ids_keep, cls)
    assert visible.dtype == torch.bfloat16
    restored = ops.patch_scatter(visible, cls, ids_restore, torch.zeros(1, 10, 4).bfloat16())
    assert restored.dtype == torch.bfloat16
    assert torch.equal(restored[:, 1:][mask == 0], tokens[mask == 0])


_TOKENS, _IDS = torch.zeros(2, 9, 4), torch.zeros(2, 3, dtype=torch.int64)
_LATENT, _RESTORE = torch.zeros(2, 4, 4), torch.zeros(2, 9, dtype=torch.int64)
_TOKEN, _POS = torch.zeros(1, 1, 4), torch.zeros(1, 10, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((_TOKENS[0], None, _IDS, None), "tokens: got shape [9, 4], expected 3 dimensions"),
        ((_TOKENS, _POS, _IDS, None), "pos_embed: got shape [1, 10, 4], expected [1, 9, 4]"),
        ((_TOKENS, None, _IDS.int(), None), "ids_keep: got torch.int32, expected torch.int64"),
        ((_TOKENS, None, _IDS[:1], None), "ids_keep: got shape [1, 3], expected [2, any]"),
        ((_TOKENS, None, _IDS, _POS), "cls_token: got shape [1, 10, 4], expected [1, 1, 4]"),
    ],
)
def test_gather_errors_name_the_argument(arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        ops.patch_gather(*arguments)
    assert str(raised.value) == f"patch_gather: {message}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((_LATENT[0], _TOKEN, _RESTORE, _POS), "latent: got shape [4, 4], expected 3 dimensions"),
        (
            (torch.zeros(2, 11, 4), _TOKEN, _RESTORE, _POS),
            "latent: got 11 tokens, expected 1 to 10 (class token and kept patches)",
        ),
        ((_LATENT, _TOKEN[0], _RESTORE, _POS), "mask_token: got shape [1, 4], expected 3 dimensions"),
        ((_LATENT, _TOKEN, _RESTORE.float(), _POS), "ids_restore: got torch.float32, expected torch.int64"),
        (
            (_LATENT, _TOKEN, _RESTORE, _POS[:, 1:]),
            "decoder_pos_embed: got shape [1, 9, 4], expected [1, 10, 4]",
        ),
    ],
)
def test_scatter_errors_name_the_argument(arguments: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        ops.patch_scatter(*arguments)
    assert str(raised.value) == f"patch_scatter: {message}"
