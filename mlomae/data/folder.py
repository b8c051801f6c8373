"""Image folders: one file per image, class folders or none."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mlomae.data.images import decode_image
from mlomae.errors import UserError


def list_images(root: Path) -> tuple[str, ...]:
    """Sorted posix paths, relative to ``root``, of all image files below it (hidden ones left out).

    Raises:
        UserError: there is none.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    def fail(error: OSError) -> None:
        raise UserError(f"data.path: {error.filename} cannot be read ({error.strerror})")

    names = []
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=fail):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        prefix = Path(folder).relative_to(root)
        names += [
            (prefix / name).as_posix()
            for name in files
            if name.lower().endswith(IMG_EXTENSIONS) and not name.startswith(".")
        ]
    if not names:
        raise UserError(
            f"data.path: no images in {root}; expected files ending in {', '.join(IMG_EXTENSIONS)}"
        )
    return tuple(sorted(names))


def find_classes(root: Path, names: Sequence[str]) -> list[str] | None:
    """Sorted names of the class folders (the first parts of ``names``); None when there are none.

    Raises:
        UserError: some images lie in class folders and some do not.
    """
    loose = [name for name in names if "/" not in name]
    if len(loose) == len(names):
        return None
    if loose:
        raise UserError(
            f"data.path: {root} holds class folders and also {len(loose)} images outside of them, such as "
            f"{loose[0]}; put every image into a class folder, or none"
        )
    return sorted({name.split("/", 1)[0] for name in names})


class FolderSource:
    """The images ``names`` below ``root``; the first part of a name is its class where classes are given."""

    stack: None = None

    def __init__(
        self, root: Path, names: Sequence[str], classes: Sequence[str] | None, in_chans: int
    ) -> None:
        self.keys = names
        self.labels = None if classes is None else _labels(root, names, classes)
        self._root = root
        self._in_chans = in_chans

    def __len__(self) -> int:
        return len(self.keys)

    def read(self, index: int) -> Tensor:
        """uint8 [C, H, W]."""
        path = self._root / self.keys[index]
        return decode_image(path, self._in_chans, str(path))


def _labels(root: Path, names: Sequence[str], classes: Sequence[str]) -> Tensor:
    number = {name: index for index, name in enumerate(classes)}
    folders = [name.split("/", 1)[0] if "/" in name else "" for name in names]
    unknown = next((folder for folder in folders if folder not in number), None)
    if unknown is not None:
        found = f"class folder {unknown!r}" if unknown else "images outside class folders"
        raise UserError(
            f"data.path: {root} has {found}; expected the {len(classes)} class folders of training"
        )
    return torch.tensor([number[folder] for folder in folders])
