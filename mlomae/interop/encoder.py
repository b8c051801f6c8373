"""``mlomae.load_encoder``: a pretrained encoder as an ordinary module, for notebooks and other programs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor, nn

from mlomae.data.decoding import MODES, to_8_bits
from mlomae.data.faults import BadSample
from mlomae.data.transforms import load, normalise
from mlomae.errors import UserError
from mlomae.interop.pretrained import Pretrained
from mlomae.interop.reading import read_pretrained
from mlomae.interop.vit import build_vit
from mlomae.models.encoder import num_pooled, pool_features

Picture = Image | Tensor | str | Path


class Encoder(nn.Module):
    """A pretrained encoder: normalised images in, features out.

    ``load_encoder`` returns it in evaluation mode, on the CPU, in float32. It is a plain module otherwise:
    ``to(device)`` moves it, and gradients are recorded as in any module, so that features are best taken
    under ``torch.inference_mode()``.

    Attributes:
        vit: timm's ``VisionTransformer``, without a classifier.
        img_size: (height, width) of the images it takes.
        num_features: F, numbers per image.
        pool: cls, mean or cls+mean: how features are made of the tokens.
        mean: per channel, of values in [0, 1]: what ``preprocess`` normalises with.
        std: the same.
        arch: name of the architecture, such as vit_base.
        patch_size: side of a patch.
        in_chans: C, 3 or 1.
    """

    def __init__(self, pretrained: Pretrained, img_size: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.vit = build_vit(pretrained, img_size)
        self.arch = pretrained.arch
        self.img_size = pretrained.img_size if img_size is None else img_size
        self.patch_size = pretrained.patch_size
        self.in_chans = pretrained.in_chans
        self.pool = pretrained.pool
        self.num_features = num_pooled(self.vit.embed_dim, pretrained.pool)
        self.mean, self.std = pretrained.mean, pretrained.std

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] → features [B, F]."""
        return pool_features(self.tokens(images), self.pool)

    def tokens(self, images: Tensor) -> Tensor:
        """Normalised images [B, C, H, W] → tokens [B, 1 + L, D]: the class token, then patches row by row."""
        expected = (self.in_chans, *self.img_size)
        if images.dim() != 4 or images.shape[1:] != expected or not images.is_floating_point():
            raise ValueError(
                f"images: found {images.dtype} {list(images.shape)}, expected normalised floating-point "
                f"numbers [B, {', '.join(map(str, expected))}]; see Encoder.preprocess"
            )
        tokens: Tensor = self.vit.forward_features(images)
        return tokens

    def preprocess(self, images: Picture | Sequence[Picture]) -> Tensor:
        """Pictures of any size → a normalised batch, as evaluation makes it: resized to cover, centre crop.

        Args:
            images: a PIL image, the path of a file, or a uint8 tensor [C, H, W]; several of them, also as one
                uint8 tensor [B, C, H, W].

        Returns:
            float32 [B, C, H, W] on the encoder's device; B = 1 for a single picture.

        Raises:
            UserError: a file is no image that can be decoded.
            ValueError: a tensor is of another type or shape.
        """
        single = isinstance(images, Image | str | Path) or (isinstance(images, Tensor) and images.dim() == 3)
        pictures: Any = [images] if single else images
        if len(pictures) == 0:
            raise ValueError("images: found none, expected one or more")
        fitted = torch.stack([self._fitted(picture) for picture in pictures])
        return normalise(fitted.to(next(self.parameters()).device), self.mean, self.std)

    def _fitted(self, picture: Picture) -> Tensor:
        try:
            if isinstance(picture, str | Path):
                content: bytes | Tensor = Path(picture).read_bytes()
            elif isinstance(picture, Image):
                pixels = np.array(to_8_bits(picture).convert(MODES[self.in_chans]))
                content = torch.from_numpy(pixels.reshape(picture.height, picture.width, -1)).permute(2, 0, 1)
            else:
                content = picture
                if content.dtype != torch.uint8 or content.dim() != 3 or len(content) != self.in_chans:
                    raise ValueError(
                        f"images: found {content.dtype} {list(content.shape)}, expected torch.uint8 "
                        f"[{self.in_chans}, H, W]"
                    )
            return load(content, "none", (), self.img_size, self.in_chans)
        except OSError as error:
            raise UserError(f"{picture}: cannot be read ({error.strerror})") from None
        except BadSample as error:
            raise UserError(f"{picture}: {error.reason}") from None

    def __repr__(self) -> str:
        height, width = self.img_size
        millions = sum(parameter.numel() for parameter in self.parameters()) / 1e6
        return (
            f"Encoder({self.arch}, images {self.in_chans} x {height} x {width}, "
            f"patch size {self.patch_size}, pool {self.pool}: {self.num_features} features, "
            f"{millions:.1f} M parameters)"
        )


def load_encoder(path: str | Path, img_size: int | tuple[int, int] | None = None) -> Encoder:
    """A pretrained encoder in evaluation mode, from a run or from weights of another library.

    Args:
        path: a run, or weights of another library (docs/interop.md).
        img_size: side, or (height, width), of other images than pretraining had; positions are interpolated.

    Raises:
        UserError: the weights cannot be read, or the patch size does not divide the image size.
    """
    size = (img_size, img_size) if isinstance(img_size, int) else img_size
    return Encoder(read_pretrained(Path(path)), size).eval()
