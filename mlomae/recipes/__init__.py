"""The recipes that come with the project, by name: ``digits``, ``finetune/cifar10``."""

from __future__ import annotations

from pathlib import Path

from mlomae.arguments import did_you_mean
from mlomae.errors import UserError

SUFFIX = ".yaml"


def recipes_folder() -> Path:
    """The folder of the recipes: part of an installed package, or ``recipes/`` of a clone."""
    installed = Path(__file__).with_name("files")
    return installed if installed.is_dir() else Path(__file__).resolve().parents[2] / "recipes"


def recipes() -> dict[str, Path]:
    """The file of every recipe by its name, folders last."""
    folder = recipes_folder()
    files = sorted(folder.rglob(f"*{SUFFIX}"), key=lambda path: (len(path.relative_to(folder).parts), path))
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def find_recipe(path: Path) -> Path:
    """The file itself, or that of the recipe with this name where there is no such file.

    Raises:
        UserError: the path looks like a name, and there is neither.
    """
    if path.suffix == SUFFIX or path.is_absolute() or (path.exists() and not path.is_dir()):
        return path
    known = recipes()
    if path.as_posix() not in known:
        if path.exists():
            return path
        raise UserError(
            f"--config {path}: no such file, and no recipe; {did_you_mean(path.as_posix(), known)}"
        )
    return known[path.as_posix()]
