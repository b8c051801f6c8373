"""Pretrained weights in one form, whatever file they came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

from mlomae.sections import Positive, Section

Pool = Literal["cls", "mean", "cls+mean"]


@dataclass(frozen=True)
class Pretrained:
    """An encoder's weights, and what has to be known to use them.

    Attributes:
        arch: a key of ``mlomae.models.encoder.SIZES``.
        img_size: (height, width) for which the position embedding was made.
        patch_size: side of a patch.
        in_chans: channels of an image.
        pool: cls, mean or cls+mean: how features are made of the tokens.
        mean: per channel, of values in [0, 1]: how images are normalised.
        std: the same.
        encoder: by timm's names, float32, without a classifier.
        decoder: by the names of ``mlomae.models.mae.Decoder``, float32; None where there is none.
        decoder_heads: attention heads of the decoder, which its weights do not tell; None without one.
        norm_pix: whether the decoder predicts normalised patches.
        source: the file they were read from.
        run: the run directory, if they come from one.
    """

    arch: str
    img_size: tuple[int, int]
    patch_size: int
    in_chans: int
    pool: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    encoder: Mapping[str, Tensor]
    source: Path
    decoder: Mapping[str, Tensor] | None = None
    norm_pix: bool = True
    run: Path | None = None
    decoder_heads: int | None = None

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        return self.img_size[0] // self.patch_size, self.img_size[1] // self.patch_size

    @property
    def decoder_depth(self) -> int:
        """Blocks of the decoder, 0 where there is none."""
        return len({name.split(".")[1] for name in self.decoder or () if name.startswith("blocks.")})


class Facts(Section):
    """What the formats of other libraries have no place for: exports carry it under ``FACTS``."""

    pool: Pool
    img_size: tuple[Positive, Positive]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    norm_pix: bool
    decoder_heads: Positive | None

    @classmethod
    def of(cls, pretrained: Pretrained) -> Facts:
        return cls.model_validate({name: getattr(pretrained, name) for name in cls.model_fields})


FACTS = "mlomae"
"""The key of the facts in a config.json or a .pth file."""
