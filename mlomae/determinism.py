"""Two runs, the same bits: what of torch may differ is replaced or refused."""

from __future__ import annotations

import os

import torch


def require_determinism() -> None:
    """From here on, in this process: operations that have no repeatable form raise an error.

    To be called before cuBLAS is used, which reads its variable once.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(True)
    # It would fill every new tensor, to show reads before writes.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
