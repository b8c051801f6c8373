"""Stable ascending selection of patches: scores [B, L] → ids_keep [B, K], ids_restore [B, L], mask [B, L]."""

from __future__ import annotations

import torch
from torch import Tensor

from mlomae_kernels import checks, reference
from mlomae_kernels._registry import Operator


def _fake(scores: Tensor, num_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, patches = scores.shape
    return (
        scores.new_empty(batch, num_keep, dtype=torch.int64),
        scores.new_empty(batch, patches, dtype=torch.int64),
        scores.new_empty(batch, patches, dtype=torch.float32),
    )


SELECT = Operator(
    "select_patches(Tensor scores, SymInt num_keep) -> (Tensor ids_keep, Tensor ids_restore, Tensor mask)",
    reference=reference.select_patches,
    check=checks.check_select_patches,
    fake=_fake,
)
SELECT.differentiate(None, (0,))


def select_patches(scores: Tensor, num_keep: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keeps the ``num_keep`` patches with the lowest scores; removes the others.

    The order is that of a stable ascending sort: equal scores rank by position, -0.0 equals 0.0 and
    NaN ranks last. No gradient flows through a selection.

    Args:
        scores: floating [B, L].
        num_keep: K, from 1 to L.

    Returns:
        ids_keep: int64 [B, K], positions of the kept patches, lowest score first.
        ids_restore: int64 [B, L], rank of every patch; a patch is kept when its rank is below K.
        mask: float32 [B, L], 0 for a kept patch and 1 for a removed one.

    Raises:
        ValueError: on a wrong shape, dtype or count.
    """
    ids_keep, ids_restore, mask = SELECT.overload(scores, num_keep)
    return ids_keep, ids_restore, mask
