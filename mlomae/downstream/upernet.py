"""UPerNet (Xiao et al. 2018) on a plain ViT: four levels made of one resolution, as in BEiT and MAE.

Letters: B batch, D width of the ViT, C channels of the head, K classes, H and W the image.

All normalisation is by groups of 16 channels (GroupNorm). Unlike batch norm it is the same for any batch
size (also on the 1 x 1 map of the pyramid pooling), for any number of ranks, and in training and evaluation;
it needs no running averages and no communication.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional

GROUP = 16  # channels that are normalised together
POOLS = (1, 2, 3, 6)  # cells per side of the pyramid pooling
DROPOUT = 0.1  # of the classifier's input, by channel


class UPerNet(nn.Module):
    """A ViT and a head that gives every pixel scores.

    Args:
        encoder: without a classifier.
        channels: of the head; a multiple of GROUP.
        num_classes: K.
    """

    def __init__(self, encoder: VisionTransformer, channels: int, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.blocks = level_blocks(len(encoder.blocks))
        self.head = UPerHead(encoder.embed_dim, channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Scores [B, K, H, W] of images [B, 3, H, W]."""
        wanted = sorted(set(self.blocks))
        # The last norm is applied to all of them: it brings their sizes in line and stays in use.
        found = self.encoder.forward_intermediates(
            images, indices=wanted, norm=True, output_fmt="NCHW", intermediates_only=True
        )
        by_block = dict(zip(wanted, found, strict=True))
        return _resize(self.head([by_block[block] for block in self.blocks]), images.shape[-2:])


class UPerHead(nn.Module):
    """From four feature maps of one size to scores at a quarter of the patch size."""

    def __init__(self, width: int, channels: int, num_classes: int) -> None:
        super().__init__()
        self.rescale = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(width, width, 2, 2),
                    nn.GroupNorm(width // GROUP, width),
                    nn.GELU(),
                    nn.ConvTranspose2d(width, width, 2, 2),
                ),
                nn.ConvTranspose2d(width, width, 2, 2),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )
        self.pools = nn.ModuleList(_conv(width, channels, 1) for _ in POOLS)
        self.pooled = _conv(width + len(POOLS) * channels, channels, 3)
        self.lateral = nn.ModuleList(_conv(width, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(_conv(channels, channels, 3) for _ in range(3))
        self.fuse = _conv(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.classify = nn.Conv2d(channels, num_classes, 1)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Scores [B, K, 4h, 4w] of features 4 x [B, D, h, w], lowest block first."""
        levels = [rescale(x) for rescale, x in zip(self.rescale, features, strict=True)]
        top = self._pool(levels.pop())
        merged = [lateral(x) for lateral, x in zip(self.lateral, levels, strict=True)] + [top]
        for lower in (2, 1, 0):
            merged[lower] = merged[lower] + _resize(merged[lower + 1], merged[lower].shape[-2:])
        smoothed = [smooth(x) for smooth, x in zip(self.smooth, merged, strict=False)] + [top]
        size = smoothed[0].shape[-2:]
        fused = self.fuse(torch.cat([_resize(x, size) for x in smoothed], dim=1))
        scores: Tensor = self.classify(self.dropout(fused))
        return scores

    def _pool(self, x: Tensor) -> Tensor:
        """Pyramid pooling: what is in the image, its halves, thirds and sixths, beside each position."""
        pooled = [
            _resize(conv(functional.adaptive_avg_pool2d(x, cells)), x.shape[-2:])
            for conv, cells in zip(self.pools, POOLS, strict=True)
        ]
        mixed: Tensor = self.pooled(torch.cat([x, *pooled], dim=1))
        return mixed


def level_blocks(depth: int) -> tuple[int, int, int, int]:
    """The blocks after each quarter of the depth: 2, 5, 8, 11 of 12; a ViT of two blocks gives each twice."""
    first, second, third, last = (-(-depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4))
    return first, second, third, last


def _conv(inputs: int, outputs: int, kernel: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False),
        nn.GroupNorm(outputs // GROUP, outputs),
        nn.ReLU(inplace=True),
    )


def _resize(x: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(x.shape[-2:]) == tuple(size):
        return x
    return functional.interpolate(x, size=list(size), mode="bilinear", align_corners=False)
