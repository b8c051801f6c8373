"""From tensors that were found to a ``Pretrained``: which architecture they are, and whether all is there."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mlomae.config_errors import describe
from mlomae.data.dataset import STATISTICS
from mlomae.data.decoding import MODES
from mlomae.errors import UserError
from mlomae.interop.pretrained import FACTS, Facts, Pretrained
from mlomae.models.encoder import SIZES
from mlomae.models.mae import Decoder
from mlomae.run_dir import first_few
from mlomae.sections import ModelConfig

# A decoder of facebookresearch/mae has as many, whatever its size.
MAE_DECODER_HEADS = 16


@dataclass(frozen=True)
class Found:
    """What a file or folder holds, in the names of ``Pretrained``; None where it does not say.

    Sizes and statistics may come unchecked out of a JSON file: ``complete`` looks at them.
    """

    source: Path
    encoder: Mapping[str, Tensor]
    decoder: Mapping[str, Tensor] = field(default_factory=dict)
    img_size: Sequence[Any] | None = None
    num_heads: int | None = None
    pool: str = "cls"
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    norm_pix: bool = True
    decoder_heads: int | None = None
    run: Path | None = None

    def told(self, beside: Mapping[str, Any]) -> Found:
        """With the facts that an export of this package left beside the weights, if it is one.

        Raises:
            UserError: they are not what an export writes.
        """
        if FACTS not in beside:
            return self
        try:
            facts = Facts.model_validate(beside[FACTS])
        except ValidationError as error:
            raise UserError(f"{self.source}: {FACTS}: {describe(error, Facts)}") from None
        return replace(self, **facts.model_dump())


def complete(found: Found) -> Pretrained:
    """Checks names, shapes and types of all tensors.

    Raises:
        UserError: it is no plain ViT of a size in ``SIZES``; one line says what is missing or too much.
    """
    path, encoder = found.source, found.encoder
    absent = [name for name in ("patch_embed.proj.weight", "pos_embed") if name not in encoder]
    if absent:
        names = first_few(sorted(encoder)) or "nothing"
        raise UserError(f"{path}: holds no ViT in timm's layout: no {', '.join(absent)}; found {names}")
    projection, positions = (list(encoder[name].shape) for name in ("patch_embed.proj.weight", "pos_embed"))
    if len(projection) != 4 or projection[2] != projection[3]:
        raise UserError(
            f"{path}: patch_embed.proj.weight is {projection}, expected [D, C, P, P]: square patches"
        )
    if len(positions) != 3:
        raise UserError(f"{path}: pos_embed is {positions}, expected [1, 1 + L, D]")
    arch = _arch(found)
    in_chans, patch_size = projection[1], projection[2]
    expected = _encoder_shapes(arch, patch_size, in_chans)
    _check_names(path, encoder, expected)
    size = _size(found, positions, patch_size)
    patches = (size[0] // patch_size) * (size[1] // patch_size)
    _check_shapes(path, encoder, {**expected, "pos_embed": (1, 1 + patches, positions[2])})
    mean, std = _statistics(found, in_chans)
    pretrained = Pretrained(
        arch, size, patch_size, in_chans, found.pool, mean, std, _float32(path, encoder), path,
        norm_pix=found.norm_pix, run=found.run,
    )  # fmt: skip
    if not found.decoder:
        return pretrained
    heads = found.decoder_heads or MAE_DECODER_HEADS
    expected = _decoder_shapes(pretrained, found.decoder, heads)
    _check_names(path, found.decoder, expected)
    _check_shapes(path, found.decoder, expected)
    return replace(pretrained, decoder=_float32(path, found.decoder), decoder_heads=heads)


def _arch(found: Found) -> str:
    width, depth = found.encoder["pos_embed"].shape[-1], _depth(found.encoder)
    sizes = {name: size for name, size in SIZES.items() if size[:2] == (width, depth)}
    if not sizes:
        known = ", ".join(f"{name} {size[0]} x {size[1]}" for name, size in SIZES.items())
        raise UserError(f"{found.source}: width {width}, depth {depth} is no known size ({known})")
    ((arch, (*_, heads)),) = sizes.items()
    if found.num_heads not in (None, heads):
        raise UserError(f"{found.source}: has {found.num_heads} attention heads, {arch} has {heads}")
    return arch


def _depth(tensors: Mapping[str, Tensor]) -> int:
    numbers = [int(match[1]) for name in tensors if (match := re.match(r"blocks\.(\d+)\.", name))]
    return max(numbers, default=-1) + 1


def _size(found: Found, positions: list[int], patch_size: int) -> tuple[int, int]:
    if found.img_size is None:
        return _square(found.source, positions, patch_size)
    sides = [side for side in found.img_size if type(side) is int and side > 0 and side % patch_size == 0]
    if len(found.img_size) != 2 or len(sides) != 2:
        raise UserError(
            f"{found.source}: its image size is {found.img_size!r}, expected multiples of {patch_size}, the "
            "patch size"
        )
    return sides[0], sides[1]


def _square(path: Path, positions: list[int], patch_size: int) -> tuple[int, int]:
    patches = max(0, positions[1] - 1)
    side = math.isqrt(patches)
    if side == 0 or side**2 != patches:
        raise UserError(
            f"{path}: pos_embed is {positions}: not a class token and a square grid; give the run directory, "
            "or the folder with its config.json"
        )
    return side * patch_size, side * patch_size


def _encoder_shapes(arch: str, patch_size: int, in_chans: int) -> dict[str, tuple[int, ...]]:
    """By name, for images of a single patch."""
    width, depth, heads = SIZES[arch]
    with torch.device("meta"):
        vit = VisionTransformer(
            img_size=patch_size, patch_size=patch_size, in_chans=in_chans, num_classes=0,
            embed_dim=width, depth=depth, num_heads=heads, weight_init="skip",
        )  # fmt: skip
    return {name: tuple(tensor.shape) for name, tensor in vit.state_dict().items()}


def _decoder_shapes(
    pretrained: Pretrained, decoder: Mapping[str, Tensor], heads: int
) -> dict[str, tuple[int, ...]]:
    embed = decoder.get("embed.weight")
    if embed is None or embed.dim() != 2 or not _depth(decoder):
        raise UserError(f"{pretrained.source}: has an incomplete decoder: {first_few(sorted(decoder))}")
    fields = {
        "arch": pretrained.arch,
        "img_size": pretrained.img_size,
        "patch_size": pretrained.patch_size,
        "in_chans": pretrained.in_chans,
        "decoder_dim": embed.shape[0],
        "decoder_depth": _depth(decoder),
        "decoder_heads": heads,
        "norm_pix": pretrained.norm_pix,
    }
    try:
        model = ModelConfig.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"{pretrained.source}: its decoder: {describe(error, ModelConfig)}") from None
    with torch.device("meta"):
        expected = Decoder(model, SIZES[pretrained.arch][0])
    return {name: tuple(tensor.shape) for name, tensor in expected.state_dict().items()}


def _check_names(path: Path, found: Iterable[str], expected: Collection[str]) -> None:
    found = list(found)
    problems = [f"{name} is too much" for name in found if name not in expected]
    problems += [f"{name} is missing" for name in expected if name not in found]
    if problems:
        raise UserError(
            f"{path}: is no plain ViT with a class token ({first_few(problems)}); variants are not supported"
        )


def _check_shapes(path: Path, found: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    problems = [
        f"{name} is {list(found[name].shape)}, should be {list(shape)}"
        for name, shape in expected.items()
        if tuple(found[name].shape) != shape
    ]
    if problems:
        raise UserError(f"{path}: is of another size than its names tell ({first_few(problems)})")


def _float32(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise UserError(f"{path}: {name} is {tensor.dtype}, expected floating-point numbers")
    return {name: tensor.detach().to(torch.float32).contiguous() for name, tensor in tensors.items()}


def _by_channel(values: Any, in_chans: int) -> Any:
    """Hugging Face takes one number for all channels, too; timm 1.0.26 writes three of it for grey images."""
    if isinstance(values, float | int):
        return [values] * in_chans
    thrice = isinstance(values, Sequence) and len(values) == 3 and values.count(values[0]) == 3
    return values[:1] if in_chans == 1 and thrice else values


def _statistics(found: Found, in_chans: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """What the file says; else those of photographs."""
    if in_chans not in MODES:
        raise UserError(f"{found.source}: is for {in_chans} channels; images have 3 (colour) or 1 (grey)")
    mean, std = STATISTICS[MODES[in_chans]]
    given = [_by_channel(values, in_chans) for values in (found.mean or mean, found.std or std)]
    for values in given:
        numbers = isinstance(values, Sequence) and all(isinstance(value, float | int) for value in values)
        if not numbers or len(values) != in_chans:
            raise UserError(
                f"{found.source}: mean or std is {values!r}, expected {in_chans} numbers, one a channel"
            )
    return tuple(map(float, given[0])), tuple(map(float, given[1]))
