"""Move parameters along a direction and put them back bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Move = Callable[[Tensor], None]
"""Sets the parameters to ``theta + eps * v`` for a 0-dim ``eps``."""


@contextmanager
def perturbation(parameters: Sequence[Tensor], direction: Sequence[Tensor]) -> Iterator[Move]:
    """Yields ``move(eps)``, which sets the parameters to ``theta + eps * v``.

    On leaving, also by an exception, the original values are copied back: subtracting what was added
    would drift by rounding. ``eps`` is a 0-dim tensor, so that no host synchronisation is needed.
    """
    originals = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def move(eps: Tensor) -> None:
        for parameter, original, v in zip(parameters, originals, direction, strict=True):
            parameter.copy_(torch.addcmul(original, v, eps))

    try:
        yield move
    finally:
        with torch.no_grad():
            for parameter, original in zip(parameters, originals, strict=True):
                parameter.copy_(original)


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all tensors together, a 0-dim tensor."""
    norms: Sequence[Tensor] = torch._foreach_norm([tensor.detach() for tensor in tensors])
    return torch.linalg.vector_norm(torch.stack(list(norms)))
