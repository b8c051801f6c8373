"""timm's ViT from pretrained weights, at the image size and with the head that a task needs."""

from __future__ import annotations

from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional

from mlomae.errors import UserError
from mlomae.interop.pretrained import Pretrained
from mlomae.models.encoder import SIZES, init_linear, sincos_positions

HEAD_STD = 2e-5  # of a classifier's first weights, as in MAE's fine-tuning


def build_vit(
    pretrained: Pretrained,
    img_size: tuple[int, int] | None = None,
    scratch: bool = False,
    num_classes: int = 0,
    **options: Any,
) -> VisionTransformer:
    """A timm ViT with the pretrained encoder.

    Args:
        img_size: (height, width); positions are interpolated where the grid changes. None: as pretrained.
        scratch: keep the architecture and draw its weights anew, from torch's generator, as pretraining
            does: the baseline that a pretrained encoder has to beat.
        num_classes: of a classifier, whose weights are drawn; 0 for none.
        options: of timm's ``VisionTransformer``, such as ``global_pool`` and ``drop_path_rate``.

    Raises:
        UserError: the patch size does not divide the image size.
    """
    size = pretrained.img_size if img_size is None else img_size
    if any(side % pretrained.patch_size for side in size):
        raise UserError(
            f"img_size: {list(size)} is not divisible by the encoder's patch size {pretrained.patch_size}; "
            "choose a multiple of it"
        )
    width, depth, heads = SIZES[pretrained.arch]
    vit = VisionTransformer(
        img_size=size,
        patch_size=pretrained.patch_size,
        in_chans=pretrained.in_chans,
        embed_dim=width,
        depth=depth,
        num_heads=heads,
        num_classes=num_classes,
        weight_init="skip",
        **options,
    )
    if scratch:
        _initialise(vit)
    else:
        _load(vit, pretrained)
    if isinstance(vit.head, torch.nn.Linear):
        torch.nn.init.trunc_normal_(vit.head.weight, std=HEAD_STD)
        torch.nn.init.zeros_(vit.head.bias)
    return vit


def resample_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embedding [1, 1 + L, D] of another grid (rows, columns): bicubic, the class token's kept."""
    if old == new:
        return positions
    # Not timm's function, of which some releases take grids of as many patches for the same one.
    kept, patches = positions[:, :1], positions[:, 1:].unflatten(1, old).permute(0, 3, 1, 2)
    resampled = functional.interpolate(patches, new, mode="bicubic", antialias=True)
    return torch.cat([kept, resampled.flatten(2).transpose(1, 2)], dim=1)


def _load(vit: VisionTransformer, pretrained: Pretrained) -> None:
    state = dict(pretrained.encoder)
    grid = vit.patch_embed.grid_size
    state["pos_embed"] = resample_positions(state["pos_embed"], pretrained.grid, (grid[0], grid[1]))
    if vit.fc_norm is not None and not isinstance(vit.fc_norm, torch.nn.Identity):
        # With an averaged pool timm normalises after it, by a layer of its own.
        state |= {f"fc_{name}": state.pop(name) for name in ("norm.weight", "norm.bias")}
    result = vit.load_state_dict(state, strict=False)
    expected = {"head.weight", "head.bias"} if vit.num_classes else set()
    assert set(result.missing_keys) == expected and not result.unexpected_keys, result


def _initialise(vit: VisionTransformer) -> None:
    grid = vit.patch_embed.grid_size
    with torch.no_grad():
        assert vit.pos_embed is not None and vit.cls_token is not None
        vit.pos_embed.copy_(sincos_positions((grid[0], grid[1]), vit.embed_dim, prefix=1))
    torch.nn.init.normal_(vit.cls_token, std=0.02)
    projection = vit.patch_embed.proj.weight
    torch.nn.init.xavier_uniform_(projection.view(projection.shape[0], -1))
    torch.nn.init.zeros_(vit.patch_embed.proj.bias)
    vit.apply(init_linear)
