"""patchify, unpatchify and masked_patch_loss against loops over pixels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import mlomae_kernels as ops
from tests.ops.targets import LAYOUTS, NATIVE, REFERENCE, Target, each_target, laid_out
from tests.tolerances import assert_within

_PAIRS = (
    (torch.float32, torch.float32),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
)
"""dtypes of (pred, images)."""


def _patches_by_loop(images: Tensor, size: int) -> list[list[list[float]]]:
    """[B][L][P] of Python numbers: grid row by row; within a patch (row, column, channel)."""
    batch, channels, height, width = images.shape
    corners = [(top, left) for top in range(0, height, size) for left in range(0, width, size)]
    return [
        [
            [
                images[index, channel, top + y, left + x].item()
                for y in range(size)
                for x in range(size)
                for channel in range(channels)
            ]
            for top, left in corners
        ]
        for index in range(batch)
    ]


def _differences_by_loop(pred: Tensor, images: Tensor, ids: Tensor, size: int, norm_pix: bool) -> Tensor:
    """Prediction minus target [B, N, P] in float64, for every predicted patch."""
    differences = torch.zeros(pred.shape, dtype=torch.float64)
    patches = _patches_by_loop(images, size)
    for row in range(len(pred)):
        for slot, position in enumerate(ids[row].tolist()):
            patch = patches[row][position]
            if norm_pix:
                mean = math.fsum(patch) / len(patch)
                variance = math.fsum((pixel - mean) ** 2 for pixel in patch) / (len(patch) - 1)
                patch = [(pixel - mean) / math.sqrt(variance + 1e-6) for pixel in patch]
            differences[row, slot] = pred[row, slot].double() - torch.tensor(patch, dtype=torch.float64)
    return differences


@dataclass(frozen=True)
class Problem:
    """One call, and the exact differences at its predicted patches."""

    pred: Tensor
    images: Tensor
    removed: Tensor
    weights: Tensor | None
    size: int
    norm_pix: bool

    @property
    def ids(self) -> Tensor:
        if self.removed.dtype == torch.int64:
            return self.removed
        return torch.arange(self.removed.shape[1]).expand_as(self.removed)

    @property
    def counts(self) -> Tensor:
        """[B, N], 1 at removed patches."""
        if self.removed.dtype == torch.int64:
            return torch.ones(self.removed.shape, dtype=torch.float64)
        return (self.removed != 0).double()

    def differences(self) -> Tensor:
        exact = _differences_by_loop(self.pred, self.images, self.ids, self.size, self.norm_pix)
        return exact * self.counts.unsqueeze(-1)

    def on(self, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        weights = None if self.weights is None else self.weights.to(device)
        return self.pred.to(device), self.images.to(device), self.removed.to(device), weights


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    size, rows, columns = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    channels = draw(st.integers(1, 4))
    batch, patches, numbers = draw(st.integers(1, 3)), rows * columns, size * size * channels
    pred_dtype, image_dtype = draw(st.sampled_from(_PAIRS))
    layout = draw(st.sampled_from(LAYOUTS))
    torch.manual_seed(draw(st.integers(0, 1000)))
    images = laid_out(torch.randn(batch, channels, rows * size, columns * size).to(image_dtype), layout)
    num_keep = draw(st.integers(1, patches))
    with ops.implementation("reference"):
        _, ids_restore, mask = ops.select_patches(torch.rand(batch, patches), num_keep)
    removed: Tensor = mask
    if draw(st.booleans()):
        removed = ids_restore.argsort(dim=1)[:, num_keep:]
    pred = laid_out(torch.randn(batch, removed.shape[1], numbers).to(pred_dtype), layout)
    weights = torch.rand(removed.shape, dtype=torch.promote_types(pred_dtype, torch.float32))
    norm_pix = draw(st.booleans()) and numbers > 1
    return Problem(pred, images, removed, weights if draw(st.booleans()) else None, size, norm_pix)


@pytest.mark.parametrize(("size", "grid", "channels"), [(1, (2, 3), 2), (2, (3, 2), 3), (3, (1, 5), 1)])
def test_patchify_orders_row_column_channel(size: int, grid: tuple[int, int], channels: int) -> None:
    images = torch.randn(2, channels, grid[0] * size, grid[1] * size, dtype=torch.float64)
    assert ops.patchify(images, size).tolist() == _patches_by_loop(images, size)


@given(st.integers(0, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
def test_unpatchify_inverts_patchify(batch: int, rows: int, columns: int, size: int, channels: int) -> None:
    images = torch.randn(batch, channels, rows * size, columns * size)
    patches = ops.patchify(images, size)
    assert patches.shape == (batch, rows * columns, size * size * channels)
    assert torch.equal(ops.unpatchify(patches, (rows, columns), size), images)


def test_loss_of_a_hand_worked_patch() -> None:
    images = torch.tensor([[[[1.0, 3.0, 9.0, 9.0]]]]).expand(1, 1, 2, 4)  # patches 1 3 1 3 and 9 9 9 9
    pred, mask = torch.tensor([[[1.0, 1.0, 1.0, 1.0], [9.0, 9.0, 9.0, 11.0]]]), torch.ones(1, 2)
    plain = ops.masked_patch_loss(pred, images, mask, patch_size=2, norm_pix=False)
    assert plain.tolist() == [[2.0, 1.0]]
    # 1 3 1 3 has the mean 2 and the unbiased variance 4/3; a patch of one colour becomes 0.
    scale = 1 / math.sqrt(4 / 3 + 1e-6)
    expected = [[((1 + scale) ** 2 + (1 - scale) ** 2) / 2, (3 * 81 + 121) / 4]]
    actual = ops.masked_patch_loss(pred, images, mask, patch_size=2, norm_pix=True)
    assert_within("masked_patch_loss", actual, torch.tensor(expected, dtype=torch.float64))


@each_target
@given(problem=problems())
def test_loss_is_a_loop_over_pixels(target: Target, problem: Problem) -> None:
    with target.use():
        actual = ops.masked_patch_loss(
            *problem.on(target.device), patch_size=problem.size, norm_pix=problem.norm_pix
        ).cpu()
    expected = problem.differences().square().mean(dim=2)
    if problem.weights is not None:
        expected = expected * problem.weights
    assert actual.dtype == torch.promote_types(problem.pred.dtype, torch.float32)
    assert actual.shape == problem.removed.shape
    assert_within("masked_patch_loss", actual, expected)
    assert torch.equal(actual[problem.counts == 0], torch.zeros_like(actual[problem.counts == 0]))


@each_target
@given(problem=problems())
def test_gradients_are_those_of_the_formula(target: Target, problem: Problem) -> None:
    pred, images, removed, weights = problem.on(target.device)
    pred = pred.detach().requires_grad_()
    weights = None if weights is None else weights.requires_grad_()
    with target.use():
        loss = ops.masked_patch_loss(
            pred, images, removed, weights, patch_size=problem.size, norm_pix=problem.norm_pix
        )
        cotangent = torch.randn(loss.shape, dtype=loss.dtype).to(target.device)
        inputs = [pred] if weights is None else [pred, weights]
        gradients = torch.autograd.grad(loss, inputs, cotangent)
    differences = problem.differences()
    scale = cotangent.cpu().double() * (1 if problem.weights is None else problem.weights.double())
    exact = scale.unsqueeze(-1) * 2 / pred.shape[2] * differences
    assert gradients[0].dtype == problem.pred.dtype
    assert_within("masked_patch_loss/d_pred", gradients[0].cpu(), exact)
    assert torch.equal(
        gradients[0].cpu()[problem.counts == 0], torch.zeros_like(problem.pred[problem.counts == 0])
    )
    if problem.weights is not None:
        expected = cotangent.cpu().double() * differences.square().mean(dim=2)
        assert_within("masked_patch_loss", gradients[1].cpu(), expected)


@each_target
def test_kept_patches_count_for_nothing(target: Target) -> None:
    mask = torch.tensor([[0.0, 1, 0, 1, 1, 0]], device=target.device)
    pred = torch.randn(1, 6, 4, device=target.device)
    images = torch.randn(1, 1, 4, 6, device=target.device)
    weights = torch.ones(1, 6, device=target.device)
    kept = mask == 0
    spoiled = pred.masked_fill(kept.unsqueeze(-1), float("inf")).requires_grad_()
    wild = weights.masked_fill(kept, float("nan")).requires_grad_()
    with target.use():
        loss = ops.masked_patch_loss(spoiled, images, mask, wild, patch_size=2, norm_pix=True)
        assert torch.equal(loss[kept], torch.zeros(3, device=target.device))
        assert torch.equal(
            loss, ops.masked_patch_loss(pred, images, mask, weights, patch_size=2, norm_pix=True)
        )
        loss.backward(torch.ones_like(loss).masked_fill(kept, float("inf")))
    assert spoiled.grad is not None
    assert wild.grad is not None
    assert torch.equal(spoiled.grad[kept], torch.zeros(3, 4, device=target.device))
    assert torch.equal(wild.grad[kept], torch.zeros(3, device=target.device))
    assert (spoiled.grad[mask == 1] != 0).all()


@each_target
def test_contrast_far_below_brightness_is_not_lost(target: Target) -> None:
    # Mean 1000, deviation 0.1: float32 has room for it, but not for the difference of the two squares
    # in a one-pass variance.
    images = 1000 + 0.1 * torch.randn(1, 3, 4, 4)
    pred, mask = torch.randn(1, 1, 48), torch.ones(1, 1)
    expected = _differences_by_loop(pred, images, torch.zeros(1, 1, dtype=torch.int64), 4, True)
    with target.use():
        inputs = (t.to(target.device) for t in (pred, images, mask))
        loss = ops.masked_patch_loss(*inputs, patch_size=4, norm_pix=True)
    assert loss.item() == pytest.approx(expected.square().mean().item(), rel=1e-2)


@each_target
@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_derivatives(target: Target, norm_pix: bool) -> None:
    device = target.device
    pred = torch.randn(1, 3, 8, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.rand(1, 3, dtype=torch.float64, device=device, requires_grad=True)
    images = torch.randn(1, 2, 2, 6, dtype=torch.float64, device=device)
    mask = torch.tensor([[1.0, 0.0, 1.0]], device=device)

    def errors(pred: Tensor, weights: Tensor) -> Tensor:
        return ops.masked_patch_loss(pred, images, mask, weights, patch_size=2, norm_pix=norm_pix)

    with target.use():
        assert gradcheck(errors, (pred, weights), check_forward_ad=True)
        assert gradgradcheck(errors, (pred, weights))


def test_images_have_gradients_too() -> None:
    pred = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)
    images = torch.randn(1, 2, 2, 6, dtype=torch.float64, requires_grad=True)

    def errors(pred: Tensor, images: Tensor) -> Tensor:
        return ops.masked_patch_loss(pred, images, torch.ones(1, 3), patch_size=2, norm_pix=True)

    assert gradcheck(errors, (pred, images))
    assert gradgradcheck(errors, (pred, images))


@pytest.mark.parametrize("target", [REFERENCE, NATIVE], ids=["reference", "native"])
def test_positions_out_of_range_are_errors_on_the_cpu(target: Target) -> None:
    ids = torch.tensor([[0, 4]])
    pred, images = torch.zeros(1, 2, 12), torch.zeros(1, 3, 4, 4)
    with (
        target.use(),
        pytest.raises((ValueError, RuntimeError), match="masked_patch_loss: removed: got 4, expected 0 to 3"),
    ):
        ops.masked_patch_loss(pred, images, ids, patch_size=2, norm_pix=True)


_PRED, _IMAGES, _MASK = torch.zeros(2, 4, 12), torch.zeros(2, 3, 4, 4), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("arguments", "size", "message"),
    [
        ((_PRED.long(), _IMAGES, _MASK), 2, "pred: got torch.int64, expected a floating dtype"),
        ((_PRED, _IMAGES.byte(), _MASK), 2, "images: got torch.uint8, expected a floating dtype"),
        (
            (_PRED, _IMAGES.double(), _MASK),
            2,
            "images: got torch.float64, expected torch.float32",
        ),
        ((_PRED, _IMAGES[0], _MASK), 2, "images: got shape [3, 4, 4], expected 4 dimensions"),
        ((_PRED, _IMAGES, _MASK), 3, "images: got 4 x 4 pixels, expected multiples of 3 (patch_size)"),
        ((_PRED, _IMAGES, _MASK), 0, "patch_size: got 0, expected 1 or more"),
        ((_PRED[:, 1:], _IMAGES, _MASK), 2, "pred: got shape [2, 3, 12], expected [2, 4, 12]"),
        (
            (_PRED, _IMAGES, _MASK.bool()),
            2,
            "removed: got torch.bool, expected torch.float32 (a mask) or torch.int64 (positions)",
        ),
        ((_PRED, _IMAGES, _MASK[:1]), 2, "removed: got shape [1, 4], expected [2, 4]"),
        ((_PRED, _IMAGES, _MASK, _MASK[:1]), 2, "weights: got shape [1, 4], expected [2, 4]"),
        ((_PRED, _IMAGES, _MASK, _MASK.half()), 2, "weights: got torch.float16, expected torch.float32"),
        (
            (torch.zeros(2, 16, 1), _IMAGES[:, :1], torch.zeros(2, 16)),
            1,
            "patch_size: got 1 with norm_pix, expected patches of 2 or more numbers",
        ),
    ],
)
def test_errors_name_the_argument(arguments: tuple[Any, ...], size: int, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        ops.masked_patch_loss(*arguments, patch_size=size, norm_pix=True)
    assert str(raised.value) == f"masked_patch_loss: {message}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((_PRED[0], (2, 2), 2), "patches: got shape [4, 12], expected 3 dimensions"),
        ((_PRED, (3, 2), 2), "grid: got 3 x 2, expected a grid of 4 patches"),
        ((_PRED, (2, 2), 5), "patches: got 12 numbers per patch, expected a multiple of 25"),
    ],
)
def test_unpatchify_errors_name_the_argument(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError) as raised:
        ops.unpatchify(*arguments)
    assert str(raised.value) == f"unpatchify: {message}"
