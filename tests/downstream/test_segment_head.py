"""UPerNet on a ViT: levels, shapes, gradients, and windows over large images."""

from __future__ import annotations

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mlomae.downstream.segment import MAX_STEP, window_scores
from mlomae.downstream.upernet import UPerNet, level_blocks


def make_vit(depth: int = 2, size: tuple[int, int] = (16, 24)) -> VisionTransformer:
    return VisionTransformer(
        img_size=size, patch_size=4, embed_dim=32, depth=depth, num_heads=2, num_classes=0
    )


def test_levels_are_the_quarters_of_the_depth() -> None:
    assert level_blocks(12) == (2, 5, 8, 11)
    assert level_blocks(24) == (5, 11, 17, 23)
    assert level_blocks(4) == (0, 1, 2, 3)
    assert level_blocks(2) == (0, 0, 1, 1)


@pytest.mark.parametrize(("depth", "size"), [(2, (16, 24)), (4, (12, 12)), (4, (4, 4))])
def test_every_pixel_has_scores_and_every_parameter_a_gradient(depth: int, size: tuple[int, int]) -> None:
    model = UPerNet(make_vit(depth, size), channels=16, num_classes=5)

    scores = model(torch.randn(2, 3, *size))
    scores.square().mean().backward()

    assert scores.shape == (2, 5, *size)
    # Of several ranks' gradients each parameter must have one.
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_levels_come_from_their_blocks() -> None:
    """A level does not see what lies above its block."""
    model = UPerNet(make_vit(4), channels=16, num_classes=5).eval()
    seen: list[list[Tensor]] = []
    model.head.register_forward_pre_hook(lambda module, inputs: seen.append(list(inputs[0])))
    images = torch.randn(1, 3, 16, 24)
    model(images)
    with torch.no_grad():
        model.encoder.blocks[2].mlp.fc2.weight.add_(1.0)
    model(images)

    changed = [not torch.equal(before, after) for before, after in zip(*seen, strict=True)]
    assert changed == [False, False, True, True]
    assert seen[0][0].shape == (1, 32, 4, 6)


def test_a_sample_does_not_depend_on_its_batch_in_training() -> None:
    """Which batch norm would violate; without the noise of the dropouts."""
    model = UPerNet(make_vit(), channels=16, num_classes=5).train()
    model.head.dropout = nn.Identity()
    images = torch.randn(3, 3, 16, 24)
    torch.testing.assert_close(model(images)[:1], model(images[:1]), rtol=1e-4, atol=1e-5)


class ByPixel(nn.Module):
    """Scores that depend on the pixel alone; remembers how large its batches were."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        return torch.cat([images, images.square()], dim=1)


@pytest.mark.parametrize("shape", [(16, 24), (16, 25), (16, 40), (50, 24), (60, 100)])
def test_windows_cover_an_image_and_are_put_together(shape: tuple[int, int]) -> None:
    image, model = torch.randn(3, *shape), ByPixel()

    scores = window_scores(model, image, (16, 24))

    torch.testing.assert_close(scores, model(image[None])[0])
    needed = [
        1 + -(-(have - side) // int(side * MAX_STEP)) for have, side in zip(shape, (16, 24), strict=True)
    ]
    assert sum(model.batches[:-1]) == needed[0] * needed[1]


def test_overlapping_windows_are_averaged() -> None:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen = 0

        def forward(self, images: Tensor) -> Tensor:
            marks = torch.arange(self.seen, self.seen + len(images)).float()
            self.seen += len(images)
            return marks[:, None, None, None].expand(-1, 1, *images.shape[2:])

    scores = window_scores(Counter(), torch.zeros(3, 4, 10), (4, 6))  # at columns 0 and 4
    assert scores[0, 0].tolist() == [0, 0, 0, 0, 0.5, 0.5, 1, 1, 1, 1]
