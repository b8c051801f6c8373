"""What shards can be made of: image folders, tables, MedMNIST archives and torchvision's data sets."""

from __future__ import annotations

import hashlib
import inspect
import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mlomae.data.csv_table import open_csv
from mlomae.data.dataset import Dataset, Source
from mlomae.data.faults import BadSample
from mlomae.data.folder import FilesSource, class_labels, find_classes, list_images
from mlomae.data.medmnist import open_medmnist
from mlomae.errors import UserError

if TYPE_CHECKING:
    from PIL.Image import Image

TORCHVISION = "torchvision:"
PARTS = ("train", "test", "val")

# What torchvision's data sets call the parts.
_SPLITS = {"train": ("train", "trainval", "train-standard"), "test": ("test", "val", "valid")}


class Images(Protocol):
    """The samples of one part."""

    @property
    def names(self) -> Sequence[str]:
        """Where each comes from; unique."""

    def read(self, index: int) -> tuple[bytes | Image, int]:
        """An encoded file or pixels, and the class number; -1: none.

        Raises:
            BadSample: it cannot be had.
        """

    def digest(self) -> str:
        """Of the list of samples: another list has another one."""


@dataclass(frozen=True)
class Inputs:
    """A data set that shards are to be made of: its parts by name, and its class names where it has some."""

    source: str
    parts: dict[str, Images]
    classes: tuple[str, ...] | None = None


def open_inputs(
    source: str, root: Path | None = None, download: bool = False, parts: Sequence[str] = ()
) -> Inputs:
    """Opens a data set; no image is read.

    Args:
        source: an image folder, a .csv or .npz file, or ``torchvision:NAME``.
        root: of torchvision's data sets.
        download: lets torchvision do so.
        parts: those to be opened; all when empty.

    Raises:
        UserError: there is no such data set, or it lacks one of ``parts``.
    """
    is_torchvision = source.startswith(TORCHVISION)
    if not is_torchvision and (root is not None or download):
        raise UserError(f"--root and --download are for {TORCHVISION}NAME; leave them out for {source}")
    try:
        inputs = _open_torchvision(source, root, download) if is_torchvision else _open_path(Path(source))
    except UserError as error:  # of readers that know a configuration
        raise UserError(str(error).removeprefix("data.path: ")) from None
    missing = next((part for part in parts if part not in inputs.parts), None)
    if missing is not None:
        raise UserError(f"--parts: {source} has no part {missing!r}, only {', '.join(inputs.parts)}")
    chosen = {name: images for name, images in inputs.parts.items() if not parts or name in parts}
    return Inputs(inputs.source, chosen, inputs.classes)


class SourceImages:
    """The samples of a source, whose names get a ``prefix``."""

    def __init__(self, source: Source, prefix: str = "") -> None:
        self.names: Sequence[str] = [f"{prefix}{key}" for key in source.keys] if prefix else source.keys
        self._source = source

    def read(self, index: int) -> tuple[bytes | Image, int]:
        labels, stack = self._source.labels, self._source.stack
        label = -1 if labels is None else int(labels[index])
        if stack is None:
            return self._source.content(index), label
        from PIL import Image

        # Grey images that are shown as colours have one channel in memory.
        grey = stack.shape[1] == 1 or stack.stride(1) == 0
        pixels = stack[index, 0] if grey else stack[index].permute(1, 2, 0)
        return Image.fromarray(pixels.contiguous().numpy()), label

    def digest(self) -> str:
        labels, stack = self._source.labels, self._source.stack
        rows = self.names if labels is None else _with_labels(self.names, labels.tolist())
        digest = _digest_lines(rows)
        if stack is not None:
            # Names of arrays are no more than numbers.
            for image in stack:
                digest.update(image[: 1 if stack.stride(1) == 0 else None].contiguous().numpy())
        return digest.hexdigest()


class TorchvisionImages:
    """A data set of torchvision that yields pairs of an image and a class number."""

    def __init__(self, dataset: Any, title: str, part: str) -> None:
        self.names: Sequence[str] = [f"{part}/{index:06d}" for index in range(len(dataset))]
        self._dataset = dataset
        self._title = title

    def read(self, index: int) -> tuple[bytes | Image, int]:
        from PIL.Image import Image

        try:
            sample = self._dataset[index]
        except MemoryError:
            raise
        except Exception as error:  # whatever the decoders raise on damaged bytes
            raise BadSample("damaged", " ".join(str(error).split()) or type(error).__name__) from None
        try:
            picture, label = sample
            number = operator.index(label)
        except (TypeError, ValueError):
            picture = number = None
        if not isinstance(picture, Image | bytes) or number is None:
            raise UserError(f"{self._title}: yields no pairs of an image and a class number; use another one")
        return picture, max(number, -1)

    def digest(self) -> str:
        return _digest_lines([*self.names, self._title]).hexdigest()


def _open_path(path: Path) -> Inputs:
    source = str(path.resolve())
    if path.is_dir():
        return _open_folder(path, source)
    if not path.is_file():
        raise UserError(
            f"{path}: not there; expected an image folder, a .csv or .npz file, or {TORCHVISION}NAME"
        )
    openers: dict[str, Callable[[Path, int], Dataset]] = {
        ".csv": open_csv,
        ".tsv": open_csv,
        ".npz": open_medmnist,
    }
    if path.suffix.lower() not in openers:
        raise UserError(f"{path}: neither a folder nor a file ending in {', '.join(openers)}")
    dataset = openers[path.suffix.lower()](path, 3)
    parts: dict[str, Images] = {"train": SourceImages(dataset.train)}
    if dataset.open_test is not None:
        parts["test"] = SourceImages(dataset.open_test())
    return Inputs(source, parts)


def _open_folder(path: Path, source: str) -> Inputs:
    test = next((part for part in ("test", "val") if (path / part).is_dir()), None)
    if not (path / "train").is_dir():
        if test is not None:
            raise UserError(f"{path}: has a folder {test!r} but no 'train'; add or rename it")
        names = list_images(path)
        classes = find_classes(path, names)
        files = FilesSource(path, names, class_labels(path, names, classes, partial=True))
        return Inputs(source, {"train": SourceImages(files)}, None if classes is None else tuple(classes))
    parts: dict[str, Images] = {}
    classes = None
    for part in ("train", test) if test is not None else ("train",):
        root = path / part
        names = list_images(root)
        if part == "train":
            classes = find_classes(root, names)
        labels = class_labels(root, names, classes, partial=part == "train")
        parts[part] = SourceImages(FilesSource(root, names, labels), prefix=f"{part}/")
    return Inputs(source, parts, None if classes is None else tuple(classes))


def _open_torchvision(source: str, root: Path | None, download: bool) -> Inputs:
    from torchvision import datasets

    name = source.removeprefix(TORCHVISION)
    maker = getattr(datasets, name, None) if name in datasets.__all__ else None
    if not inspect.isclass(maker):
        raise UserError(
            f"{source}: torchvision.datasets has no {name!r}; see its documentation for the names"
        )
    options = inspect.signature(maker).parameters
    arguments: dict[str, Any] = {}
    if "root" in options:
        if root is None:
            raise UserError(f"--root: give the folder of torchvision's {name}")
        arguments["root"] = str(root)
    if download:
        arguments["download"] = True
    if "loader" in options or issubclass(maker, datasets.DatasetFolder):
        arguments["loader"] = _read_file  # files are not decoded, and keep their bytes
    parts: dict[str, Images] = {}
    classes = None
    for part in ("train", "test"):
        dataset = _make_part(source, maker, set(options), arguments, part)
        if dataset is not None:
            parts[part] = TorchvisionImages(dataset, source, part)
            classes = classes or getattr(dataset, "classes", None)
    return Inputs(f"{source} in {root.resolve()}" if root else source, parts, _class_names(classes))


def _make_part(source: str, maker: Any, options: set[str], arguments: dict[str, Any], part: str) -> Any:
    """The part, or None where there is no test part."""
    if "train" in options:
        attempts: list[dict[str, Any]] = [{"train": part == "train"}]
    elif "split" in options:
        attempts = [{"split": split} for split in _SPLITS[part]]
    else:
        attempts = [{}] if part == "train" else []
    refusal = ""
    for attempt in attempts:
        try:
            return maker(**arguments, **attempt)
        except ValueError as error:  # no such split
            refusal = refusal or str(error)
        except (OSError, RuntimeError, TypeError, ImportError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"{source}: cannot be opened ({reason}); correct --root, or add --download"
            ) from None
    if part == "train":
        raise UserError(f"{source}: has no part for training ({' '.join(refusal.split())}); use another one")
    return None


def _read_file(path: str) -> bytes:
    return Path(path).read_bytes()


def _class_names(classes: Any) -> tuple[str, ...] | None:
    if not classes:
        return None
    return tuple(name if isinstance(name, str) else ", ".join(name) for name in classes)


def _with_labels(names: Sequence[str], labels: Sequence[int]) -> Iterator[str]:
    return (f"{name}\t{label}" for name, label in zip(names, labels, strict=True))


def _digest_lines(lines: Sequence[str] | Iterator[str]) -> Any:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest
