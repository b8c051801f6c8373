"""The simple feature pyramid of ViTDet (Li et al. 2022, arXiv 2203.16527): four scales of a plain ViT."""

from __future__ import annotations

from collections import OrderedDict

from timm.layers.norm import LayerNorm2d
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

STRIDES = {"0": 1 / 4, "1": 1 / 2, "2": 1, "3": 2, "pool": 4}  # of each map, in patches; torchvision's names


class PyramidBackbone(nn.Module):
    """Feature maps at 1/4, 1/2, 1, 2 and 4 patches per cell, all made of the last block's tokens.

    Attributes:
        out_channels: of each map.

    Args:
        encoder: for images of one size, with a class token and without a classifier.
    """

    def __init__(self, encoder: VisionTransformer, out_channels: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.out_channels = out_channels
        width = encoder.embed_dim
        self.scales = nn.ModuleList(
            [
                nn.Sequential(
                    nn.ConvTranspose2d(width, width // 2, 2, stride=2),
                    LayerNorm2d(width // 2),
                    nn.GELU(),
                    nn.ConvTranspose2d(width // 2, width // 4, 2, stride=2),
                    *_smooth(width // 4, out_channels),
                ),
                nn.Sequential(
                    nn.ConvTranspose2d(width, width // 2, 2, stride=2), *_smooth(width // 2, out_channels)
                ),
                nn.Sequential(*_smooth(width, out_channels)),
                nn.Sequential(nn.MaxPool2d(2), *_smooth(width, out_channels)),
            ]
        )

    def forward(self, images: Tensor) -> OrderedDict[str, Tensor]:
        """Maps by the names in STRIDES.

        Args:
            images: [B, C, H, W]; H and W are multiples of four patches, so that no cell is cut.

        Returns:
            float32 [B, out_channels, ·, ·] each: boxes in pixels, which follow from them, do not fit bf16.
        """
        tokens = self.encoder.forward_features(images)[:, self.encoder.num_prefix_tokens :]
        rows, columns = self.encoder.patch_embed.grid_size
        grid = tokens.transpose(1, 2).reshape(len(images), -1, rows, columns)
        maps = [scale(grid).float() for scale in self.scales]
        maps.append(F.max_pool2d(maps[-1], 1, stride=2))
        return OrderedDict(zip(STRIDES, maps, strict=True))


def _smooth(channels: int, out_channels: int) -> list[nn.Module]:
    return [
        nn.Conv2d(channels, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    ]
