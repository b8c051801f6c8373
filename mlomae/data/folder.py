"""Image folders: one file per image, class folders or none."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mlomae.data.faults import BadSample
from mlomae.data.urls import with_retries
from mlomae.errors import UserError

# Of a name that no file can have.
_NO_NAME = (errno.ELOOP, errno.ENAMETOOLONG)
_LOST = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
UNLABELLED = ("unlabelled", "unlabeled")  # a folder beside the class folders that is no class


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
        UserError: some images lie in class folders and some outside of any folder.
    """
    loose = [name for name in names if "/" not in name]
    classes = sorted({name.split("/", 1)[0] for name in names if "/" in name}.difference(UNLABELLED))
    if not classes:
        return None
    if loose:
        raise UserError(
            f"data.path: {root} holds class folders and also {len(loose)} images outside of them, such as "
            f"{loose[0]}; put every image into a class folder or into 'unlabelled', or all into none"
        )
    return classes


def class_labels(
    root: Path, names: Sequence[str], classes: Sequence[str] | None, partial: bool = False
) -> Tensor | None:
    """Class numbers int64 [N] from the first parts of ``names``; None where there are no classes.

    Args:
        partial: images in a folder ``unlabelled`` get -1; it is refused otherwise.

    Raises:
        UserError: an image lies in no class folder.
    """
    if classes is None:
        return None
    number = {name: index for index, name in enumerate(classes)}
    if partial:
        number.update(dict.fromkeys(UNLABELLED, -1))
    folders = [name.split("/", 1)[0] if "/" in name else "" for name in names]
    unknown = next((folder for folder in folders if folder not in number), None)
    if unknown is not None:
        found = f"class folder {unknown!r}" if unknown else "images outside class folders"
        raise UserError(
            f"data.path: {root} has {found}; expected the {len(classes)} class folders of training"
        )
    return torch.tensor([number[folder] for folder in folders])


class FilesSource:
    """One image per file: ``names`` are relative to ``root`` (or absolute) and serve as keys."""

    stack: None = None

    def __init__(self, root: Path, names: Sequence[str], labels: Tensor | None) -> None:
        self.keys = names
        self.labels = labels
        self._root = root

    def __len__(self) -> int:
        return len(self.keys)

    def content(self, index: int) -> bytes:
        """The file, as it is.

        Raises:
            BadSample: it is missing or cannot be read.
        """
        path = self._root / self.keys[index]
        try:
            return path.read_bytes()
        except OSError as error:
            if isinstance(error, _LOST) or error.errno in _NO_NAME:
                raise BadSample("unreadable", f"cannot be read ({error.strerror})") from None
            # Of a disk or a network, which may come back.
            return with_retries(path.read_bytes, str(path))
