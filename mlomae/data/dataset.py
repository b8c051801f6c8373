"""What a data set is: indexable parts, of which a test part is opened only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

VOID = 255
"""Of a label map: the pixel counts nowhere."""

# Channel means and standard deviations of values in [0, 1].
STATISTICS: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {
    "digits": ((0.305,), (0.376,)),
    "cifar10": ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
    "cifar100": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
    "L": ((0.449,), (0.226,)),  # photographs in grey
    "RGB": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),  # photographs (ImageNet)
}


class Source(Protocol):
    """One indexable part of a data set."""

    @property
    def keys(self) -> Sequence[str]:
        """Stable, unique names of the samples."""

    @property
    def labels(self) -> Tensor | None:
        """int64 [N], -1 where a sample has no label; None when none has one, or they are label maps.

        Of maps that lie in memory at the size of the stack: uint8 [N, H, W].
        """

    @property
    def stack(self) -> Tensor | None:
        """uint8 [N, C, H, W] when all images lie in memory at one size; then there is no ``content``."""

    def __len__(self) -> int: ...

    def content(self, index: int) -> bytes:
        """The encoded file of one sample.

        Raises:
            BadSample: it cannot be read.
        """


@dataclass(frozen=True)
class TensorSource:
    """Images of one size, in memory."""

    keys: Sequence[str]
    stack: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return len(self.keys)

    def content(self, index: int) -> bytes:
        raise TypeError(f"{self.keys[index]} lies decoded in the stack")


@dataclass(frozen=True)
class PartFiles:
    """The files behind a part: names relative to ``root``, either images or whole shards."""

    root: Path
    names: Sequence[str]
    shards: bool = False


@dataclass(frozen=True)
class Dataset:
    """A data set: its training part, and how to open its test part where it has one of its own."""

    train: Source
    num_classes: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    open_test: Callable[[], Source] | None = None
    files: tuple[PartFiles, PartFiles] | None = None  # of training and of test, where both are known
    class_names: tuple[str, ...] | None = None  # where the classes have names
