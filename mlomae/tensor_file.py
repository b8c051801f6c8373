"""Tensors and a few plain values in one safetensors file, replaced in one step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from mlomae.checkpoint_file import safetensors_parts, write_file
from mlomae.errors import UserError
from mlomae.run_dir import replacing


def write_tensors(path: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any] | None = None) -> None:
    """Replaces ``path`` by a safetensors file; a reader, or a crash, sees the old or the new one.

    Args:
        state: counters, serialisable as JSON; kept in the file's header.

    Raises:
        OSError: it cannot be written; what was there is intact.
    """
    metadata = {} if state is None else {"state": json.dumps(state)}
    with replacing(path) as temporary:
        write_file(temporary, safetensors_parts(tensors, metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Tensors and state of a file; None where there is none.

    Raises:
        UserError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            state = json.loads((file.metadata() or {}).get("state", "{}"))
    except (OSError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({reason}); delete it to begin anew") from None
    return tensors, state
