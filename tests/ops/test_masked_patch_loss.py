"""patchify, unpatchify and masked_patch_loss against loops over pixels."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

import mlomae_kernels as ops
from tests.tolerances import assert_within


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


def _loss_by_loop(pred: Tensor, images: Tensor, mask: Tensor, size: int, norm_pix: bool) -> Tensor:
    errors = torch.zeros(mask.shape, dtype=torch.float64)
    for row, patches in enumerate(_patches_by_loop(images, size)):
        for column, patch in enumerate(patches):
            if mask[row, column] == 0:
                continue
            if norm_pix:
                mean = math.fsum(patch) / len(patch)
                variance = math.fsum((pixel - mean) ** 2 for pixel in patch) / (len(patch) - 1)
                patch = [(pixel - mean) / math.sqrt(variance + 1e-6) for pixel in patch]
            squares = [(a - b) ** 2 for a, b in zip(pred[row, column].tolist(), patch, strict=True)]
            errors[row, column] = math.fsum(squares) / len(squares)
    return errors


def _problem(
    dtype: torch.dtype, size: int, grid: tuple[int, int], channels: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(pred, images, mask) of a batch of 2 with half of the patches removed."""
    patches = grid[0] * grid[1]
    images = torch.randn(2, channels, grid[0] * size, grid[1] * size).to(dtype)
    pred = torch.randn(2, patches, size * size * channels).to(dtype)
    return pred, images, ops.select_patches(torch.rand(2, patches), patches // 2)[2]


@pytest.mark.parametrize(("size", "grid", "channels"), [(1, (2, 3), 2), (2, (3, 2), 3), (3, (1, 5), 1)])
def test_patchify_orders_row_column_channel(size: int, grid: tuple[int, int], channels: int) -> None:
    _, images, _ = _problem(torch.float64, size, grid, channels)
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
    assert ops.masked_patch_loss(pred, images, mask, 2, norm_pix=False).tolist() == [[2.0, 1.0]]
    # 1 3 1 3 has the mean 2 and the unbiased variance 4/3; a patch of one colour becomes 0.
    scale = 1 / math.sqrt(4 / 3 + 1e-6)
    expected = [[((1 + scale) ** 2 + (1 - scale) ** 2) / 2, (3 * 81 + 121) / 4]]
    actual = ops.masked_patch_loss(pred, images, mask, 2, norm_pix=True)
    assert_within("masked_patch_loss", actual, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("norm_pix", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "grid", "channels"), [(2, (3, 2), 3), (4, (1, 5), 1), (5, (2, 2), 3)])
def test_loss_is_a_loop_over_pixels(
    norm_pix: bool, dtype: torch.dtype, size: int, grid: tuple[int, int], channels: int
) -> None:
    pred, images, mask = _problem(dtype, size, grid, channels)
    actual = ops.masked_patch_loss(pred, images, mask, size, norm_pix)
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_within("masked_patch_loss", actual, _loss_by_loop(pred, images, mask, size, norm_pix), dtype)


def test_kept_patches_count_for_nothing() -> None:
    pred, images, mask = _problem(torch.float32, 2, (2, 3), 1)
    kept = (mask == 0).unsqueeze(-1)
    spoiled = pred.masked_fill(kept, float("inf")).requires_grad_()
    loss = ops.masked_patch_loss(spoiled, images, mask, 2, norm_pix=True)
    assert torch.equal(loss[mask == 0], torch.zeros(6))
    assert torch.equal(loss, ops.masked_patch_loss(pred, images, mask, 2, norm_pix=True))
    loss.sum().backward()
    assert spoiled.grad is not None
    assert torch.equal(spoiled.grad[mask == 0], torch.zeros(6, 4))
    assert (spoiled.grad[mask == 1] != 0).all()


@pytest.mark.parametrize("norm_pix", [True, False])
def test_loss_derivatives(norm_pix: bool) -> None:
    pred, images, mask = _problem(torch.float64, 2, (1, 3), 2)
    inputs = (pred.requires_grad_(), images.requires_grad_())

    def errors(pred: Tensor, images: Tensor) -> Tensor:
        return ops.masked_patch_loss(pred, images, mask, 2, norm_pix)

    assert gradcheck(errors, inputs, check_forward_ad=True)
    assert gradgradcheck(errors, inputs)


def test_forward_and_reverse_mode_agree_under_function_transforms() -> None:
    pred, images, mask = _problem(torch.float64, 2, (2, 2), 1)

    def total(pred: Tensor) -> Tensor:
        return ops.masked_patch_loss(pred, images, mask, 2, norm_pix=True).sum()

    tangent = torch.randn_like(pred)
    _, derivative = torch.func.jvp(total, (pred,), (tangent,))
    assert_within("masked_patch_loss", derivative, (torch.func.grad(total)(pred) * tangent).sum())


_PRED, _IMAGES, _MASK = torch.zeros(2, 4, 12), torch.zeros(2, 3, 4, 4), torch.zeros(2, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((_PRED.long(), _IMAGES, _MASK, 2, True), "pred: got torch.int64, expected a floating dtype"),
        ((_PRED, _IMAGES.byte(), _MASK, 2, True), "images: got torch.uint8, expected a floating dtype"),
        ((_PRED, _IMAGES[0], _MASK, 2, True), "images: got shape [3, 4, 4], expected 4 dimensions"),
        ((_PRED, _IMAGES, _MASK, 3, True), "images: got 4 x 4 pixels, expected multiples of 3 (patch_size)"),
        ((_PRED, _IMAGES, _MASK, 0, True), "patch_size: got 0, expected 1 or more"),
        ((_PRED[:, 1:], _IMAGES, _MASK, 2, True), "pred: got shape [2, 3, 12], expected [2, 4, 12]"),
        ((_PRED, _IMAGES, _MASK[:1], 2, True), "mask: got shape [1, 4], expected [2, 4]"),
        (
            (torch.zeros(2, 16, 1), _IMAGES[:, :1], torch.zeros(2, 16), 1, True),
            "patch_size: got 1 with norm_pix, expected patches of 2 or more numbers",
        ),
    ],
)
def test_errors_name_the_argument(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        ops.masked_patch_loss(*arguments)
    assert str(raised.value) == f"masked_patch_loss: {message}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((_PRED[0], (2, 2), 2), "patches: got shape [4, 12], expected 3 dimensions"),
        ((_PRED, (3, 2), 2), "grid: got 3 x 2, expected a grid of 4 patches"),
        ((_PRED, (2, 2), 5), "patches: got 12 numbers per patch, expected a multiple of 25"),
    ],
)
def test_unpatchify_errors_name_the_argument(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError) as raised:
        ops.unpatchify(*arguments)
    assert str(raised.value) == f"unpatchify: {message}"
