"""Compiled modules: what ``compute.execution`` means, and how to step around the compiler.

Whole modules are compiled, not blocks: the residual sum of one block joins the normalisation of the next.
The DeepSpeed engine stays outside. Shapes are static: after the first iterations nothing is compiled again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

_MOST_GRAPHS = 64


def resolve_execution(wanted: str, device: torch.device, sharded: bool = False) -> str:
    """eager, compiled or graphs: what ``compute.execution`` means on a device.

    Args:
        sharded: weights are gathered by hooks (ZeRO 3), which do not fit into one graph.
    """
    if wanted == "auto":
        return "compiled" if device.type == "cuda" and not sharded else "eager"
    return wanted


def compile_module(module: nn.Module, execution: str) -> None:
    """Compiles the module's call in place; its state dict and its submodules stay what they are.

    Args:
        execution: eager does nothing; graphs replays CUDA graphs on a GPU.
    """
    if execution == "eager":
        return
    # All modules share one limit, and a run needs eight graphs.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, _MOST_GRAPHS)
    mode = "reduce-overhead" if execution == "graphs" else None
    module.compile(fullgraph=True, dynamic=False, mode=mode)
    if execution == "graphs":
        # The next replay writes over a graph's results, but they are read until the mask step.
        replay = module._compiled_call_impl
        assert replay is not None

        def call(*args: Any, **kwargs: Any) -> Any:
            found = replay(*args, **kwargs)
            return found.clone() if isinstance(found, torch.Tensor) else tuple(part.clone() for part in found)

        module._compiled_call_impl = call


@contextmanager
def eagerly() -> Iterator[None]:
    """Within the context compiled modules run as they are written.

    For what the compiler cannot do (second derivatives, forward mode) and for passing shapes, which it would
    compile for once.
    """
    with torch.compiler.set_stance("force_eager"):
        yield
