"""What documented commands find: small runs, pictures and data sets, made once and copied into place."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from tests.data.made_boxes import make_boxes
from tests.data.made_scenes import write_scenes
from tests.docs.workplace import Workplace
from tests.integration.tiny import FEW_TO_FIT, Fields, write_recipe
from tests.study.made import results

COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 50, 40)}
"""Class → mean colour of the images of the folder ``colours``."""
_IN_COLOUR: Fields = {
    "model.img_size": 32, "model.patch_size": 8, "model.in_chans": 3,
    "data.dataset": "folder", "data.path": "colours", "picture_every": 2,
}  # fmt: skip


class Stock:
    """Things by name, each made when it is first asked for.

    Args:
        workplace: where they are made.
    """

    def __init__(self, workplace: Workplace) -> None:
        self._place = workplace
        self._makers: dict[str, Callable[[Path], object]] = {
            "digits-run": lambda path: self._train(path, FEW_TO_FIT),
            "colour-run": lambda path: self._train(path, _IN_COLOUR),
            "colours": _colours,
            "picture": lambda path: _picture(path, COLOURS["blue"], 1),
            "scenes": _scenes,
            "boxes": _boxes,
            "shards": self._shards,
            "table": self._table,
            "sweep": lambda path: path.write_text("--seed 1\n--seed 2 --pretrain.lr 3e-4\n"),
            "hosts": lambda path: path.write_text("one slots=8\ntwo slots=8\n"),
            "results": lambda path: path.write_text(results({"random": [0.4, 0.5], "learned": [0.5]}).dump()),
            "recipe": lambda path: write_recipe(path, _IN_COLOUR),
            "weights": self._weights,
        }

    def give(self, name: str, target: Path) -> None:
        """Puts a copy of a thing at ``target`` unless there is something already."""
        if target.exists():
            return
        made = self._made(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        if made.is_dir():
            shutil.copytree(made, target)
        else:
            shutil.copy(made, target)

    def _made(self, name: str) -> Path:
        path = self._place.folder / name
        if not path.exists():
            self._makers[name](path)
        return path

    def _run(self, command: str) -> None:
        done = self._place.run(command)
        assert done.code == 0, f"{command}:\n{done.out}\n{done.err}"

    def _train(self, path: Path, fields: Fields) -> None:
        if "data.path" in fields:
            self._made("colours")
        recipe = write_recipe(path.with_suffix(".yaml"), fields)
        self._run(f"mlomae train --config {recipe.name} --run-dir {path.name}")

    def _shards(self, path: Path) -> None:
        self._made("colours")
        self._run(f"mlomae shards create colours {path.name}")

    def _table(self, path: Path) -> None:
        files = sorted(self._made("colours").glob("*/*/*.png"))
        rows = [f"{file.relative_to(path.parent)},{file.parent.name},{file.parts[-3]}" for file in files]
        path.write_text("\n".join(["path,label,split", *rows]) + "\n")

    def _weights(self, path: Path) -> None:
        self._made("colour-run")
        self._run("mlomae export colour-run --to mae --out exported.pth")
        shutil.move(path.with_name("exported.pth"), path)


def _picture(path: Path, colour: tuple[int, int, int], seed: int) -> None:
    pixels = np.random.default_rng(seed).normal(colour, 40, (32, 32, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(pixels).save(path, "PNG")


def _colours(path: Path) -> None:
    """train/CLASS and test/CLASS with PNGs of 32x32 pixels, noise around the class's colour."""
    for part, numbers in {"train": range(20), "test": range(20, 26)}.items():
        for name, colour in COLOURS.items():
            (path / part / name).mkdir(parents=True)
            for number in numbers:
                _picture(path / part / name / f"{number:02d}.png", colour, number)


def _scenes(path: Path) -> None:
    """Scenes of three classes, under the names of ADE20K's parts and of CamVid's."""
    for first, part in enumerate(("training", "validation", "testing")):
        write_scenes(path, part, 8, size=(32, 32), first=8 * first)


def _boxes(path: Path) -> None:
    """Boxes, under the names of COCO's parts and of BCCD's."""
    make_boxes(path, dict.fromkeys(("train", "train2017", "test", "val", "val2017"), 8))
