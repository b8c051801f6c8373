"""patch_gather and patch_scatter against explicit loops; derivatives; their inverse relation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import mlomae_kernels as ops
from tests.ops.targets import (
    DTYPES,
    LAYOUTS,
    NATIVE,
    REFERENCE,
    Target,
    assert_rounded,
    assert_sums,
    each_target,
    laid_out,
)


@dataclass(frozen=True)
class Case:
    """Shapes, dtype and memory layout of one call, and the seed of its values."""

    batch: int
    patches: int
    num_keep: int
    width: int
    dtype: torch.dtype
    layout: str
    seed: int

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=torch.Generator().manual_seed(self.seed)).to(self.dtype)

    def selection(self) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(self.seed)
        # Few distinct scores: ties are the rule.
        scores = torch.randint(4, (self.batch, self.patches), generator=generator).float()
        with ops.implementation("reference"):
            return ops.select_patches(scores, self.num_keep)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    patches = draw(st.integers(1, 40))
    return Case(
        batch=draw(st.integers(1, 3)),
        patches=patches,
        num_keep=draw(st.integers(1, patches)),
        width=draw(st.integers(1, 21)),
        dtype=draw(st.sampled_from(DTYPES)),
        layout=draw(st.sampled_from(LAYOUTS)),
        seed=draw(st.integers(0, 1000)),
    )


@each_target
@given(case=cases(), with_pos=st.booleans(), with_cls=st.booleans())
def test_gather_is_a_loop_over_kept_patches(
    target: Target, case: Case, with_pos: bool, with_cls: bool
) -> None:
    ids_keep = case.selection()[0]
    tokens = laid_out(case.random(case.batch, case.patches, case.width), case.layout)
    pos = case.random(1, case.patches, case.width) if with_pos else None
    cls = case.random(1, 1, case.width) if with_cls else None
    with target.use():
        moved = (None if t is None else t.to(target.device) for t in (tokens, pos, ids_keep, cls))
        actual = ops.patch_gather(*moved).cpu()
    assert actual.shape == (case.batch, case.num_keep + with_cls, case.width)
    assert actual.dtype == case.dtype
    assert actual.is_contiguous()
    for row in range(case.batch):
        if cls is not None:
            assert torch.equal(actual[row, 0], cls[0, 0])
        for slot, patch in enumerate(ids_keep[row].tolist()):
            if pos is None:
                assert torch.equal(actual[row, slot + with_cls], tokens[row, patch])
            else:
                exact = tokens[row, patch].double() + pos[0, patch].double()
                assert_rounded(actual[row, slot + with_cls], exact, target)


@each_target
@given(case=cases(), need_pos=st.booleans(), has_cls=st.booleans())
def test_gather_backward_moves_rows_back_and_sums_over_images(
    target: Target, case: Case, need_pos: bool, has_cls: bool
) -> None:
    ids_keep = case.selection()[0]
    grad = laid_out(case.random(case.batch, case.num_keep + has_cls, case.width), case.layout)
    with target.use():
        d_tokens, d_pos, d_cls = torch.ops.mlomae.patch_gather_backward(
            grad.to(target.device), ids_keep.to(target.device), case.patches, has_cls, need_pos
        )
    expected = torch.zeros(case.batch, case.patches, case.width, dtype=case.dtype)
    for row in range(case.batch):
        for slot, patch in enumerate(ids_keep[row].tolist()):
            expected[row, patch] = grad[row, slot + has_cls]
    assert torch.equal(d_tokens.cpu(), expected)
    assert (d_pos.shape, d_cls.shape) == (
        (1, case.patches, case.width) if need_pos else (0,),
        (1, 1, case.width) if has_cls else (0,),
    )
    if need_pos:
        assert_sums(d_pos[0], expected, target)
    if has_cls:
        assert_sums(d_cls[0, 0], grad[:, 0], target)


@each_target
@given(case=cases())
def test_scatter_is_a_loop_over_all_patches(target: Target, case: Case) -> None:
    ids_keep, ids_restore, _ = case.selection()
    latent = laid_out(case.random(case.batch, 1 + case.num_keep, case.width), case.layout)
    mask_token, pos = case.random(1, 1, case.width), case.random(1, 1 + case.patches, case.width)
    with target.use():
        actual = ops.patch_scatter(*(t.to(target.device) for t in (latent, mask_token, ids_restore, pos)))
    actual = actual.cpu()
    assert actual.shape == (case.batch, 1 + case.patches, case.width)
    assert actual.dtype == case.dtype
    for row in range(case.batch):
        assert_rounded(actual[row, 0], latent[row, 0].double() + pos[0, 0].double(), target)
        kept = ids_keep[row].tolist()
        for patch in range(case.patches):
            token = latent[row, 1 + kept.index(patch)] if patch in kept else mask_token[0, 0]
            assert_rounded(actual[row, 1 + patch], token.double() + pos[0, 1 + patch].double(), target)


@each_target
@given(case=cases(), need_pos=st.booleans())
def test_scatter_backward_moves_rows_back_and_sums_the_rest(
    target: Target, case: Case, need_pos: bool
) -> None:
    ids_keep, ids_restore, mask = case.selection()
    grad = laid_out(case.random(case.batch, 1 + case.patches, case.width), case.layout)
    with target.use():
        d_latent, d_mask_token, d_pos = torch.ops.mlomae.patch_scatter_backward(
            grad.to(target.device), ids_restore.to(target.device), case.num_keep, need_pos
        )
    for row in range(case.batch):
        assert torch.equal(d_latent[row, 0].cpu(), grad[row, 0])
        assert torch.equal(d_latent[row, 1:].cpu(), grad[row, 1:][ids_keep[row]])
    assert_sums(d_mask_token[0, 0], grad[:, 1:][mask > 0], target)
    assert d_pos.shape == ((1, 1 + case.patches, case.width) if need_pos else (0,))
    if need_pos:
        assert_sums(d_pos[0], grad, target)


@each_target
@given(case=cases())
def test_scatter_undoes_gather_on_kept_patches(target: Target, case: Case) -> None:
    ids_keep, ids_restore, mask = case.selection()
    tokens, cls = case.random(case.batch, case.patches, case.width), case.random(1, 1, case.width)
    mask_token = torch.full((1, 1, case.width), 7.0, dtype=case.dtype)
    zeros = torch.zeros(1, 1 + case.patches, case.width, dtype=case.dtype)
    with target.use():
        device = target.device
        visible = ops.patch_gather(tokens.to(device), None, ids_keep.to(device), cls.to(device))
        actual = ops.patch_scatter(
            visible, mask_token.to(device), ids_restore.to(device), zeros.to(device)
        ).cpu()
    assert torch.equal(actual[:, 1:], torch.where(mask.unsqueeze(-1) > 0, mask_token, tokens))
    assert torch.equal(actual[:, :1], cls.expand(case.batch, -1, -1))


@pytest.mark.parametrize("target", [REFERENCE, NATIVE], ids=["reference", "native"])
@given(case=cases())
def test_gather_follows_a_permutation_of_the_patches(target: Target, case: Case) -> None:
    scores, tokens = torch.rand(case.batch, case.patches), torch.randn(case.batch, case.patches, case.width)
    shuffle = torch.randperm(case.patches)
    with target.use():
        plain = ops.patch_gather(tokens, None, ops.select_patches(scores, case.num_keep)[0], None)
        ids_keep = ops.select_patches(scores[:, shuffle], case.num_keep)[0]
        assert torch.equal(ops.patch_gather(tokens[:, shuffle], None, ids_keep, None), plain)


def _double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@each_target
def test_gather_derivatives(target: Target) -> None:
    ids_keep = ops.select_patches(torch.rand(2, 5), 3)[0].to(target.device)
    inputs = tuple(
        t.detach().to(target.device).requires_grad_()
        for t in (_double(2, 5, 2), _double(1, 5, 2), _double(1, 1, 2))
    )

    def visible(tokens: Tensor, pos: Tensor, cls: Tensor) -> Tensor:
        return ops.patch_gather(tokens, pos, ids_keep, cls).sin()

    with target.use():
        assert gradcheck(visible, inputs, check_forward_ad=True)
        assert gradgradcheck(visible, inputs)


@each_target
def test_scatter_derivatives(target: Target) -> None:
    ids_restore = ops.select_patches(torch.rand(2, 5), 3)[1].to(target.device)
    inputs = tuple(
        t.detach().to(target.device).requires_grad_()
        for t in (_double(2, 4, 2), _double(1, 1, 2), _double(1, 6, 2))
    )

    def decoder_input(latent: Tensor, mask_token: Tensor, pos: Tensor) -> Tensor:
        return ops.patch_scatter(latent, mask_token, ids_restore, pos).sin()

    with target.use():
        assert gradcheck(decoder_input, inputs, check_forward_ad=True)
        assert gradgradcheck(decoder_input, inputs)


@each_target
def test_gradients_are_given_to_those_that_need_them(target: Target) -> None:
    ids_keep, ids_restore, _ = (t.to(target.device) for t in ops.select_patches(torch.rand(2, 5), 3))
    tokens = torch.randn(2, 5, 3, device=target.device)
    pos = torch.randn(1, 5, 3, device=target.device, requires_grad=True)
    mask_token = torch.randn(1, 1, 3, device=target.device, requires_grad=True)
    with target.use():
        visible = ops.patch_gather(tokens, pos, ids_keep, None)
        (d_pos,) = torch.autograd.grad(visible.sum(), pos)
        counts = torch.bincount(ids_keep.flatten(), minlength=5).float()
        assert torch.equal(d_pos, counts[None, :, None].expand(1, 5, 3))
        full = ops.patch_scatter(tokens[:, :4], mask_token, ids_restore, tokens.new_zeros(1, 6, 3))
        (d_mask_token,) = torch.autograd.grad(full.sum(), mask_token)
        assert torch.equal(d_mask_token, torch.full_like(mask_token, 4.0))


@each_target
def test_empty_batch(target: Target) -> None:
    ids = torch.empty(0, 3, dtype=torch.int64, device=target.device)
    tokens = torch.empty(0, 9, 4, device=target.device, requires_grad=True)
    pos = torch.randn(1, 9, 4, device=target.device, requires_grad=True)
    with target.use():
        visible = ops.patch_gather(tokens, pos, ids, None)
        assert visible.shape == (0, 3, 4)
        visible.sum().backward()
        assert pos.grad is not None
        assert torch.equal(pos.grad, torch.zeros_like(pos))
        restore = torch.empty(0, 8, dtype=torch.int64, device=target.device)
        token = torch.randn(1, 1, 4, device=target.device)
        assert ops.patch_scatter(visible, token, restore, pos).shape == (0, 9, 4)


_TOKENS, _IDS = torch.zeros(2, 9, 4), torch.zeros(2, 3, dtype=torch.int64)
_LATENT, _RESTORE = torch.zeros(2, 4, 4), torch.arange(9).expand(2, 9)
_TOKEN, _POS = torch.zeros(1, 1, 4), torch.zeros(1, 10, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((_TOKENS[0], None, _IDS, None), "tokens: got shape [9, 4], expected 3 dimensions"),
        ((_TOKENS.long(), None, _IDS, None), "tokens: got torch.int64, expected a floating dtype"),
        ((_TOKENS, _POS, _IDS, None), "pos_embed: got shape [1, 10, 4], expected [1, 9, 4]"),
        ((_TOKENS, None, _IDS.int(), None), "ids_keep: got torch.int32, expected torch.int64"),
        ((_TOKENS, None, _IDS[:1], None), "ids_keep: got shape [1, 3], expected [2, any]"),
        ((_TOKENS, None, _IDS, _POS), "cls_token: got shape [1, 10, 4], expected [1, 1, 4]"),
        ((_TOKENS, None, _IDS, _TOKEN.double()), "cls_token: got torch.float64, expected torch.float32"),
        ((_TOKENS.half(), _POS[:, 1:], _IDS, None), "pos_embed: got torch.float32, expected torch.float16"),
        (
            (_TOKENS, None, _IDS, _TOKEN.to("meta")),
            "cls_token: got a tensor on meta, expected one on cpu",
        ),
    ],
)
@pytest.mark.parametrize("target", [REFERENCE, NATIVE], ids=["reference", "native"])
def test_gather_errors_name_the_argument(target: Target, arguments: tuple[Tensor, ...], message: str) -> None:
    with target.use(), pytest.raises(ValueError) as raised:
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
        ((_LATENT, _TOKEN.half(), _RESTORE, _POS), "mask_token: got torch.float16, expected torch.float32"),
        ((_LATENT, _TOKEN, _RESTORE.float(), _POS), "ids_restore: got torch.float32, expected torch.int64"),
        (
            (_LATENT, _TOKEN, _RESTORE, _POS[:, 1:]),
            "decoder_pos_embed: got shape [1, 9, 4], expected [1, 10, 4]",
        ),
    ],
)
@pytest.mark.parametrize("target", [REFERENCE, NATIVE], ids=["reference", "native"])
def test_scatter_errors_name_the_argument(
    target: Target, arguments: tuple[Tensor, ...], message: str
) -> None:
    with target.use(), pytest.raises(ValueError) as raised:
        ops.patch_scatter(*arguments)
    assert str(raised.value) == f"patch_scatter: {message}"


@pytest.mark.parametrize("target", [REFERENCE, NATIVE], ids=["reference", "native"])
@pytest.mark.parametrize("wrong", [-1, 9, 2**40])
def test_indices_out_of_range_are_errors_on_the_cpu(target: Target, wrong: int) -> None:
    ids, restore = _IDS.clone(), _RESTORE.clone()
    ids[1, 2] = restore[1, 2] = wrong
    grad = torch.zeros(2, 10, 4)
    backward = torch.ops.mlomae
    calls: dict[str, Callable[[], Any]] = {
        "patch_gather: ids_keep": lambda: ops.patch_gather(_TOKENS, None, ids, None),
        "patch_gather_backward: ids_keep": lambda: backward.patch_gather_backward(
            grad[:, :3], ids, 9, False, False
        ),
        "patch_scatter: ids_restore": lambda: ops.patch_scatter(_LATENT, _TOKEN, restore, _POS),
        "patch_scatter_backward: ids_restore": lambda: backward.patch_scatter_backward(
            grad, restore, 3, False
        ),
    }
    for argument, call in calls.items():
        with (
            target.use(),
            pytest.raises((ValueError, RuntimeError), match=f"{argument}: got {wrong}, expected 0 to 8"),
        ):
            call()


@pytest.mark.parametrize("target", [REFERENCE, NATIVE], ids=["reference", "native"])
def test_ranks_must_be_a_permutation(target: Target) -> None:
    restore = _RESTORE.clone()
    restore[1, 2] = 0
    with (
        target.use(),
        pytest.raises((ValueError, RuntimeError), match="patch_scatter: ids_restore: got repeated ranks"),
    ):
        ops.patch_scatter(_LATENT, _TOKEN, restore, _POS)


@pytest.mark.parametrize("wrong", [-1, 9, 2**40])
def test_triton_turns_indices_out_of_range_into_nan(wrong: int) -> None:
    ids, restore = _IDS.clone(), _RESTORE.clone()
    ids[1, 2] = restore[1, 2] = wrong
    with Target("triton", "cpu").use():
        visible = ops.patch_gather(_TOKENS, None, ids, None)
        full = ops.patch_scatter(_LATENT, _TOKEN, restore, _POS)
    assert visible.isnan().all(dim=2).nonzero().tolist() == [[1, 2]]
    assert full.isnan().all(dim=2).nonzero().tolist() == [[1, 3]]
