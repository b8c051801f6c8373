"""The weights as a vector space: where the direction v lives, whole or in shards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

Vector = Sequence[Tensor]
"""A vector of this space: this rank's part of it."""
Reduce = Callable[[list[Tensor]], list[Tensor]]
"""Averages a list of tensors over all ranks."""
Move = Callable[[Tensor], None]
"""Sets the weights to ``point + eps * v`` for a 0-dim ``eps``."""


class WeightSpace(ABC):
    """Trainable weights seen as one vector. Every method is called on all ranks together.

    Attributes:
        prefix: of the names of the weights along which directions point; in all others they are 0.
        has_whole_vectors: whether ``whole`` works.
    """

    prefix = ""
    has_whole_vectors = True

    @abstractmethod
    def values(self) -> list[Tensor]:
        """The weights themselves (not copies), this rank's part."""

    @abstractmethod
    def write(self, values: Iterable[Tensor]) -> None:
        """Copies ``values`` into the weights; the next forward pass sees them."""

    @abstractmethod
    def move(self, point: Vector, direction: Vector, eps: Tensor) -> None:
        """Sets the weights to ``point + eps * direction``; the next forward pass sees them."""

    @abstractmethod
    def gradient(self, output: Tensor, cotangent: Tensor) -> list[Tensor]:
        """Vector-Jacobian product of ``output``, averaged over ranks: this rank's part.

        ``output`` depends on the weights named by ``prefix`` only.
        """

    @abstractmethod
    def norm(self, vector: Vector) -> Tensor:
        """Euclidean norm of a vector of all ranks' parts together, 0-dim."""

    @abstractmethod
    def scale(self) -> Tensor:
        """Norm of the weights that v moves, 0-dim: the unit of a relative radius."""

    @abstractmethod
    def whole(self, vector: Vector) -> dict[str, Tensor]:
        """A vector as whole tensors by parameter name, for evaluations that take weights as arguments."""


class TensorSpace(WeightSpace):
    """Weights that every rank holds whole.

    Args:
        parameters: by name, perturbed in place.
        prefix: see ``WeightSpace``.
        average: mean over ranks, for gradients.
    """

    def __init__(self, parameters: Mapping[str, Tensor], prefix: str, average: Reduce) -> None:
        self.prefix = prefix
        self._parameters = dict(parameters)
        self._moved = [p for name, p in parameters.items() if name.startswith(prefix)]
        self._average = average

    def values(self) -> list[Tensor]:
        return [parameter.detach() for parameter in self._parameters.values()]

    @torch.no_grad()
    def write(self, values: Iterable[Tensor]) -> None:
        for parameter, value in zip(self._parameters.values(), values, strict=True):
            parameter.copy_(value)

    @torch.no_grad()
    def move(self, point: Vector, direction: Vector, eps: Tensor) -> None:
        move_into(self._parameters.values(), point, direction, eps)

    def gradient(self, output: Tensor, cotangent: Tensor) -> list[Tensor]:
        moved = iter(self._average(list(torch.autograd.grad(output, self._moved, cotangent))))
        # A zero without memory of its own where the output does not depend on the weight.
        return [
            next(moved) if name.startswith(self.prefix) else parameter.new_zeros(()).expand_as(parameter)
            for name, parameter in self._parameters.items()
        ]

    def norm(self, vector: Vector) -> Tensor:
        return global_norm([v for v in vector if any(v.stride()) or not v.ndim])

    def scale(self) -> Tensor:
        return global_norm(self._moved)

    def whole(self, vector: Vector) -> dict[str, Tensor]:
        return dict(zip(self._parameters, vector, strict=True))


@contextmanager
def perturbation(space: WeightSpace, point: Vector | None, direction: Vector) -> Iterator[Move]:
    """Yields ``move(eps)``, which sets the weights to ``point + eps * v``.

    Without a point it is the present weights. On leaving, also by an exception, those are copied back:
    subtracting what was added would drift by rounding. ``eps`` is a 0-dim tensor, so that no host
    synchronisation is needed.
    """
    originals = [value.clone() for value in space.values()]
    start = originals if point is None else point

    def move(eps: Tensor) -> None:
        space.move(start, direction, eps)

    try:
        yield move
    finally:
        space.write(originals)


def move_into(weights: Iterable[Tensor], point: Vector, direction: Vector, eps: Tensor) -> None:
    """Writes ``point + eps * direction`` into ``weights`` in one pass."""
    for weight, base, v in zip(weights, point, direction, strict=True):
        torch.addcmul(base, v, eps, out=weight)


def global_norm(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm of all tensors together, a 0-dim tensor."""
    norms: Sequence[Tensor] = torch._foreach_norm([tensor.detach() for tensor in tensors])
    return torch.linalg.vector_norm(torch.stack(list(norms)))
