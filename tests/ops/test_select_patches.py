"""select_patches against numpy's stable sort, and its native twin against the reference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mlomae_kernels
from mlomae_kernels import _native, reference

# Few distinct values, so that ties are the rule, and every special one.
_SCORES = st.sampled_from([-float("inf"), -1.5, -1e-45, -0.0, 0.0, 1e-45, 2.0, float("inf"), float("nan")])


@st.composite
def _selections(draw: st.DrawFn) -> tuple[Tensor, int]:
    """scores float32 [B, L] with odd sizes, and a number of patches to keep."""
    batch, patches = draw(st.integers(1, 3)), draw(st.integers(1, 70))
    values = draw(st.lists(_SCORES, min_size=batch * patches, max_size=batch * patches))
    return torch.tensor(values).reshape(batch, patches), draw(st.integers(0, patches))


@pytest.fixture
def fresh_native() -> Iterator[None]:
    """Lets a test change what the native library is found from; restores the finding afterwards."""
    _native.native_status.cache_clear()
    yield
    _native.native_status.cache_clear()


def _require_native() -> None:
    status = mlomae_kernels.native_status()
    if not status.available:
        if os.environ.get("MLOMAE_REQUIRE_NATIVE") == "1":
            pytest.fail(f"MLOMAE_REQUIRE_NATIVE=1, but: {status.reason}")
        pytest.skip(status.reason)


def _assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


@pytest.mark.parametrize("select", [mlomae_kernels.select_patches, reference.select_patches])
@given(selection=_selections())
def test_is_the_stable_ascending_order_of_numpy(select, selection) -> None:
    scores, num_keep = selection
    ids_keep, ids_restore, mask = select(scores, num_keep)
    # numpy, too, sorts NaN last and treats the two zeros as equal.
    order = np.argsort(scores.numpy(), axis=1, kind="stable")
    assert np.array_equal(ids_keep.numpy(), order[:, :num_keep])
    ranks_in_order = np.take_along_axis(ids_restore.numpy(), order, 1)
    assert np.array_equal(ranks_in_order, np.broadcast_to(np.arange(scores.shape[1]), order.shape))
    for row, kept in enumerate(order[:, :num_keep]):
        expected = np.ones(scores.shape[1])
        expected[kept] = 0
        assert np.array_equal(mask[row].numpy(), expected)
    assert (ids_keep.dtype, ids_restore.dtype, mask.dtype) == (torch.int64, torch.int64, torch.float32)


@given(selection=_selections())
def test_kept_and_removed_patches_partition_the_image(selection) -> None:
    scores, num_keep = selection
    ids_keep, ids_restore, mask = mlomae_kernels.select_patches(scores, num_keep)
    for row in range(len(scores)):
        kept, removed = ids_keep[row].tolist(), mask[row].nonzero().flatten().tolist()
        assert sorted(kept + removed) == list(range(scores.shape[1]))
        assert sorted(ids_restore[row].tolist()) == list(range(scores.shape[1]))


def test_ties_rank_by_position() -> None:
    ids_keep, _, mask = mlomae_kernels.select_patches(torch.tensor([[1.0, 0.0, 1.0, -0.0, 0.0]]), 3)
    assert ids_keep.tolist() == [[1, 3, 4]]
    assert mask.tolist() == [[1, 0, 1, 0, 0]]


def test_nan_is_removed_before_any_number() -> None:
    nan = float("nan")
    ids_keep, _, _ = mlomae_kernels.select_patches(torch.tensor([[nan, float("inf"), -nan, 5.0]]), 4)
    assert ids_keep.tolist() == [[3, 1, 0, 2]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_select_the_same(dtype: torch.dtype) -> None:
    scores = torch.randn(4, 49).to(dtype)
    _assert_same(mlomae_kernels.select_patches(scores, 12), reference.select_patches(scores.double(), 12))


@pytest.mark.parametrize("patches", [1, 5, 31, 32, 33, 196, 1000])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "strided", "empty batch"])
def test_native_equals_reference_bit_for_bit(patches: int, layout: str) -> None:
    _require_native()
    scores = {
        "contiguous": lambda: torch.randn(5, patches),
        "transposed": lambda: torch.randn(patches, 5).t(),
        "strided": lambda: torch.randn(5, 2 * patches)[:, ::2],
        "empty batch": lambda: torch.randn(0, patches),
    }[layout]()
    native = _native.native_select_patches()
    assert native is not None
    for num_keep in (0, patches // 4, patches):
        _assert_same(native(scores, num_keep), reference.select_patches(scores, num_keep))


@given(selection=_selections())
def test_native_equals_reference_on_special_values(selection) -> None:
    _require_native()
    native = _native.native_select_patches()
    assert native is not None
    _assert_same(native(*selection), reference.select_patches(*selection))


def test_native_is_used_for_plain_cpu_float32_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []

    def spy(scores: Tensor, num_keep: int) -> tuple[Tensor, Tensor, Tensor]:
        calls.append(tuple(scores.shape))
        return reference.select_patches(scores, num_keep)

    monkeypatch.setattr("mlomae_kernels.dispatch.native_select_patches", lambda: spy)
    mlomae_kernels.select_patches(torch.randn(2, 9, requires_grad=True), 3)
    assert calls == [(2, 9)]
    mlomae_kernels.select_patches(torch.randn(2, 9).double(), 3)
    mlomae_kernels.select_patches(torch.randn(2, 9, device="meta"), 3)
    torch.vmap(lambda scores: mlomae_kernels.select_patches(scores, 3))(torch.randn(4, 2, 9))
    assert calls == [(2, 9)]


def test_native_rejects_what_it_cannot_read() -> None:
    _require_native()
    native = _native.native_select_patches()
    assert native is not None
    for scores, num_keep in ((torch.randn(2, 9).double(), 3), (torch.randn(9), 3), (torch.randn(2, 9), 10)):
        with pytest.raises(RuntimeError, match="select_patches"):
            native(scores, num_keep)


def test_no_gradient_flows_through_a_selection() -> None:
    scores = torch.randn(2, 9, requires_grad=True)
    assert not any(output.requires_grad for output in mlomae_kernels.select_patches(scores, 3))


@pytest.mark.parametrize("plain", [True, False], ids=["plain scores", "transformed scores"])
def test_works_inside_function_transforms(plain: bool) -> None:
    scores, tangent = torch.randn(2, 9), torch.randn(2, 9)
    mask = reference.select_patches(scores, 3)[2]

    def removed_sum(argument: Tensor) -> Tensor:
        return (mlomae_kernels.select_patches(scores if plain else argument, 3)[2] * argument).sum()

    assert torch.equal(torch.func.grad(removed_sum)(scores), mask)
    value, derivative = torch.func.jvp(removed_sum, (scores,), (tangent,))
    assert torch.equal(value, (mask * scores).sum())
    assert torch.equal(derivative, (mask * tangent).sum())


def test_works_under_vmap_and_compile() -> None:
    scores = torch.randn(4, 2, 9)
    mapped = torch.vmap(lambda rows: mlomae_kernels.select_patches(rows, 3))(scores)
    compiled = torch.compile(mlomae_kernels.select_patches, fullgraph=True, backend="eager")
    for index, rows in enumerate(scores):
        expected = reference.select_patches(rows, 3)
        _assert_same(tuple(output[index] for output in mapped), expected)
        _assert_same(compiled(rows, 3), expected)


@pytest.mark.parametrize(
    ("scores", "num_keep", "message"),
    [
        (torch.zeros(9), 3, "select_patches: scores: got shape [9], expected 2 dimensions"),
        (torch.zeros(2, 9).long(), 3, "select_patches: scores: got torch.int64, expected a floating dtype"),
        (torch.zeros(2, 9), 10, "select_patches: num_keep: got 10, expected 0 to 9 (the patches of scores)"),
        (torch.zeros(2, 9), -1, "select_patches: num_keep: got -1, expected 0 to 9 (the patches of scores)"),
    ],
)
def test_errors_name_the_argument(scores: Tensor, num_keep: int, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        mlomae_kernels.select_patches(scores, num_keep)
    assert str(raised.value) == message


def test_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch, fresh_native: None) -> None:
    monkeypatch.setenv("MLOMAE_KERNELS", "reference")
    assert mlomae_kernels.native_status() == (False, "switched off by MLOMAE_KERNELS=reference")
    assert _native.native_select_patches() is None


def test_unknown_choice_is_an_error(monkeypatch: pytest.MonkeyPatch, fresh_native: None) -> None:
    monkeypatch.setenv("MLOMAE_KERNELS", "fast")
    with pytest.raises(ValueError, match="MLOMAE_KERNELS: got 'fast', expected 'auto' or 'reference'"):
        mlomae_kernels.native_status()


def test_absence_has_a_reason(monkeypatch: pytest.MonkeyPatch, fresh_native: None, tmp_path: Path) -> None:
    monkeypatch.delenv("MLOMAE_KERNELS", raising=False)
    monkeypatch.setattr(_native, "_LIBRARY", tmp_path / "_C.so")
    assert mlomae_kernels.native_status() == (False, "_C.so was not built when the package was installed")
    _native.native_status.cache_clear()
    (tmp_path / "_C.so").write_bytes(b"not a library")
    status = mlomae_kernels.native_status()
    assert not status.available
    assert status.reason.startswith("_C.so cannot be loaded: ")
    # Everything goes on in plain PyTorch.
    ids_keep, _, _ = mlomae_kernels.select_patches(torch.tensor([[2.0, 1.0]]), 1)
    assert ids_keep.tolist() == [[1]]


@pytest.mark.gpu
def test_cuda_selects_the_same_as_the_cpu() -> None:
    scores = torch.randn(8, 196).round(decimals=1)
    scores[0, ::3] = float("nan")
    scores[1, ::2] = -0.0
    actual = mlomae_kernels.select_patches(scores.cuda(), 49)
    _assert_same(tuple(output.cpu() for output in actual), reference.select_patches(scores, 49))
