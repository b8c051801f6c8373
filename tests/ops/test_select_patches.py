"""select_patches against numpy's stable sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mlomae_kernels as ops
from tests.ops.targets import DTYPES, LAYOUTS, NATIVE, REFERENCE, Target, each_target, laid_out

# Few distinct values, so that ties are the rule, and every special one.
_SCORES = st.sampled_from([-float("inf"), -1.5, -1e-45, -0.0, 0.0, 1e-45, 2.0, float("inf"), float("nan")])


@st.composite
def selections(draw: st.DrawFn) -> tuple[Tensor, int]:
    """scores [B, L] of any dtype and layout with odd sizes, and a number of patches to keep."""
    batch, patches = draw(st.integers(1, 3)), draw(st.integers(1, 70))
    values = draw(st.lists(_SCORES, min_size=batch * patches, max_size=batch * patches))
    scores = torch.tensor(values).reshape(batch, patches).to(draw(st.sampled_from(DTYPES)))
    return laid_out(scores, draw(st.sampled_from(LAYOUTS))), draw(st.integers(1, patches))


def _assert_order(scores: Tensor, num_keep: int, selection: tuple[Tensor, Tensor, Tensor]) -> None:
    ids_keep, ids_restore, mask = (output.cpu() for output in selection)
    # numpy, too, sorts NaN last and treats the two zeros as equal.
    order = np.argsort(scores.cpu().double().numpy(), axis=1, kind="stable")
    assert np.array_equal(ids_keep.numpy(), order[:, :num_keep])
    ranks_in_order = np.take_along_axis(ids_restore.numpy(), order, 1)
    assert np.array_equal(ranks_in_order, np.broadcast_to(np.arange(scores.shape[1]), order.shape))
    for row, kept in enumerate(order[:, :num_keep]):
        expected = np.ones(scores.shape[1])
        expected[kept] = 0
        assert np.array_equal(mask[row].numpy(), expected)
    assert (ids_keep.dtype, ids_restore.dtype, mask.dtype) == (torch.int64, torch.int64, torch.float32)


@each_target
@given(selection=selections())
def test_is_the_stable_ascending_order_of_numpy(target: Target, selection: tuple[Tensor, int]) -> None:
    scores, num_keep = selection
    with target.use():
        _assert_order(scores, num_keep, ops.select_patches(scores.to(target.device), num_keep))


@each_target
@pytest.mark.parametrize("patches", [1, 31, 32, 33, 196, 1000])
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_patches(target: Target, patches: int, dtype: torch.dtype) -> None:
    scores = torch.randn(2, patches).to(dtype)
    num_keep = max(1, patches // 4)
    with target.use():
        _assert_order(scores, num_keep, ops.select_patches(scores.to(target.device), num_keep))


@each_target
def test_ties_rank_by_position(target: Target) -> None:
    scores = torch.tensor([[1.0, 0.0, 1.0, -0.0, 0.0]], device=target.device)
    with target.use():
        ids_keep, _, mask = ops.select_patches(scores, 3)
    assert ids_keep.tolist() == [[1, 3, 4]]
    assert mask.tolist() == [[1, 0, 1, 0, 0]]


@each_target
def test_nan_is_removed_before_any_number(target: Target) -> None:
    nan = float("nan")
    scores = torch.tensor([[nan, float("inf"), -nan, 5.0]], device=target.device)
    with target.use():
        ids_keep, _, _ = ops.select_patches(scores, 4)
    assert ids_keep.tolist() == [[3, 1, 0, 2]]


@each_target
def test_numbers_that_differ_in_the_last_bit_of_a_double(target: Target) -> None:
    scores = torch.tensor([[1.0 + 2**-52, 1.0, 1.0 - 2**-53]], dtype=torch.float64, device=target.device)
    with target.use():
        assert ops.select_patches(scores, 2)[0].tolist() == [[2, 1]]


@each_target
def test_no_gradient_flows_through_a_selection(target: Target) -> None:
    scores = torch.randn(2, 9, device=target.device, requires_grad=True)
    with target.use():
        assert not any(output.requires_grad for output in ops.select_patches(scores, 3))


@each_target
def test_empty_batch(target: Target) -> None:
    with target.use():
        shapes = [tuple(t.shape) for t in ops.select_patches(torch.empty(0, 9, device=target.device), 3)]
    assert shapes == [(0, 3), (0, 9), (0, 9)]


@pytest.mark.parametrize(
    ("scores", "num_keep", "message"),
    [
        (torch.zeros(9), 3, "select_patches: scores: got shape [9], expected 2 dimensions"),
        (torch.zeros(2, 9).long(), 3, "select_patches: scores: got torch.int64, expected a floating dtype"),
        (torch.zeros(2, 9), 10, "select_patches: num_keep: got 10, expected 1 to 9 (the patches of scores)"),
        (torch.zeros(2, 9), 0, "select_patches: num_keep: got 0, expected 1 to 9 (the patches of scores)"),
    ],
)
@pytest.mark.parametrize("target", [REFERENCE, NATIVE], ids=["reference", "native"])
def test_errors_name_the_argument(target: Target, scores: Tensor, num_keep: int, message: str) -> None:
    with target.use(), pytest.raises(ValueError) as raised:
        ops.select_patches(scores, num_keep)
    assert str(raised.value) == message
