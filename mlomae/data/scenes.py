"""Images with a label for every pixel, in ADE20K's layout.

``images/<part>/<name>.jpg`` (or another image format) and ``annotations/<part>/<name>.png``, whose pixels are
label values: 8-bit grey, or the numbers of a palette.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from mlomae.data.dataset import VOID, PartFiles
from mlomae.data.decoding import MAX_PIXELS, decode_image, image_size
from mlomae.data.faults import BadSample
from mlomae.data.folder import FilesSource, list_images
from mlomae.errors import UserError
from mlomae.sections import Location, Positive, Section, Share

MAX_CLASSES = 255  # a label map has a byte per pixel
_UNKNOWN = 256
_GREY, _PALETTE = 0, 3  # colour types of a PNG


class ScenesConfig(Section):
    """Where images with label maps come from, and what the values of the maps mean."""

    path: Location | None = Field(None, description="folder that holds images/ and annotations/ (ADE20K)")
    train: str = Field("training", description="folder in both, of the images to train on")
    test: str = Field("validation", description="folder in both, of the images to test on")
    num_classes: Positive | None = Field(None, description="whose label values follow on first_label")
    first_label: int = Field(0, ge=0, le=254, description="value of the first class; 1 for ADE20K")
    void: tuple[int, ...] = Field((), description="values that count nowhere, as 255 does; [0] for ADE20K")
    names: tuple[str, ...] = Field((), description="of the classes, for figures and pictures; else numbers")
    max_bad_share: Share = Field(0.01, description="of the samples that may be bad; they are passed over")
    workers: int = Field(0, ge=0, description="loader processes; 0 loads in the main process")

    @property
    def class_names(self) -> tuple[str, ...]:
        """One for each class; numbers where the configuration has none."""
        return self.names or tuple(str(number) for number in range(self.num_classes or 0))

    @model_validator(mode="after")
    def _check(self) -> ScenesConfig:
        if self.path is not None and self.num_classes is None:
            raise ValueError(
                f"num_classes is missing; how many classes do the label maps in {self.path} have?"
            )
        last = self.first_label + (self.num_classes or 0) - 1
        if last >= VOID:
            raise ValueError(
                f"num_classes {self.num_classes} from first_label {self.first_label} on ends at {last}; a "
                f"label map has a byte per pixel, and 255 is void, so that the last class is 254 at most"
            )
        wrong = [value for value in self.void if self.first_label <= value <= last or not 0 <= value <= 255]
        if wrong:
            raise ValueError(
                f"void {list(self.void)}: {wrong[0]} is a class or no byte; classes are {self.first_label} "
                f"to {last}"
            )
        if self.names and len(self.names) != self.num_classes:
            raise ValueError(f"names has {len(self.names)} entries for {self.num_classes} classes")
        if self.train == self.test:
            raise ValueError(
                f"train and test are the same folder {self.train!r}; the test set must be unseen"
            )
        return self


@dataclass(frozen=True)
class SceneSource:
    """One part of a set of scenes; a ``Source`` whose samples have a label map each.

    Attributes:
        keys: such as ``training/ADE_train_00000001.jpg``.
        images, maps: the files, in the same order.
        classes: int16 [256], from label value to class number, VOID or _UNKNOWN.
    """

    keys: Sequence[str]
    images: FilesSource
    maps: FilesSource
    files: PartFiles
    classes: np.ndarray
    labels: None = None
    stack: None = None

    def __len__(self) -> int:
        return len(self.keys)

    def content(self, index: int) -> bytes:
        """The encoded image.

        Raises:
            BadSample: it cannot be read.
        """
        return self.images.content(index)

    def label_map(self, index: int) -> Tensor:
        """uint8 [H, W]: class numbers, and VOID where a pixel counts nowhere.

        Raises:
            BadSample: the file is missing or damaged.
            UserError: it is no label map, or has a value that is neither a class nor void.
        """
        name = self.maps.keys[index]
        values = _decode_values(self.maps.content(index), name)
        found = self.classes[values]
        if found.max() == _UNKNOWN:
            unknown = np.unique(values[found == _UNKNOWN]).tolist()
            known = np.flatnonzero(self.classes < VOID)
            raise UserError(
                f"data: {name} has label {_some(unknown)}, but classes are {known[0]} to {known[-1]}; add it "
                "to data.void if it counts nowhere, else correct data.num_classes or data.first_label"
            )
        return torch.from_numpy(found.astype(np.uint8))

    def scene(self, index: int, in_chans: int) -> tuple[Tensor, Tensor]:
        """Image uint8 [C, H, W] and label map uint8 [H, W].

        Raises:
            BadSample: one of them is damaged.
            UserError: they differ in size, or as ``label_map``.
        """
        image = decode_image(self.content(index), in_chans)
        labels = self.label_map(index)
        self._require_size(index, image.shape[1:], labels.shape)
        return image, labels

    def verify(self) -> None:
        """Reads every map, and of every image the size; damaged files are passed over.

        Raises:
            UserError: as ``scene``.
        """

        def verify(index: int) -> None:
            with suppress(BadSample):
                self._require_size(index, image_size(self.content(index)), self.label_map(index).shape)

        with ThreadPoolExecutor() as pool:
            for _ in pool.map(verify, range(len(self))):
                pass

    def _require_size(self, index: int, image: Sequence[int], labels: Sequence[int]) -> None:
        (height, width), (rows, columns) = image, labels
        if (height, width) != (rows, columns):
            raise UserError(
                f"data: {self.keys[index]} has {width} x {height} pixels, its map {self.maps.keys[index]} "
                f"{columns} x {rows}; a map has a label for every pixel of its image"
            )


def open_scenes(config: ScenesConfig, part: str) -> SceneSource:
    """The images of one part with their label maps, sorted by name.

    Args:
        part: the folder in ``images`` and ``annotations``: ``config.train`` or ``config.test``.

    Raises:
        UserError: the folders are missing, an image lacks its map or a map its image, or no map has a pixel
            that counts.
    """
    assert config.path is not None and config.num_classes is not None, "ScenesConfig requires them"
    root = Path(config.path)
    folders = {kind: root / kind / part for kind in ("images", "annotations")}
    for folder in folders.values():
        if not folder.is_dir():
            raise UserError(
                f"data.path: {folder} is not a folder; expected images/{part} and annotations/{part} in "
                f"{root}"
            )
    images = _by_stem(folders["images"], list_images(folders["images"]))
    maps = _by_stem(
        folders["annotations"],
        [name for name in list_images(folders["annotations"]) if name.lower().endswith(".png")],
    )
    _require_pairs(folders, images, maps)
    stems = sorted(images)
    source = SceneSource(
        keys=[f"{part}/{images[stem]}" for stem in stems],
        images=FilesSource(folders["images"], [images[stem] for stem in stems], None),
        maps=FilesSource(root, [f"annotations/{part}/{maps[stem]}" for stem in stems], None),
        files=PartFiles(folders["images"], [images[stem] for stem in stems]),
        classes=_class_table(config.num_classes, config.first_label, config.void),
    )
    _require_labels(source, folders["annotations"])
    return source


def _by_stem(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Names without their suffix → names."""
    stems: dict[str, str] = {}
    for name in names:
        other = stems.setdefault(str(PurePosixPath(name).with_suffix("")), name)
        if other != name:
            raise UserError(f"data.path: {folder} has both {other} and {name}; image and map go by that name")
    return stems


def _require_pairs(folders: dict[str, Path], images: dict[str, str], maps: dict[str, str]) -> None:
    bare = sorted(images.keys() - maps.keys())
    if bare:
        raise UserError(
            f"data.path: {len(bare)} of {len(images)} images in {folders['images']} have no map in "
            f"{folders['annotations']}: {_some([f'{stem}.png' for stem in bare])}; add them or remove the "
            "images"
        )
    lonely = sorted(maps.keys() - images.keys())
    if lonely:
        raise UserError(
            f"data.path: {len(lonely)} of {len(maps)} maps in {folders['annotations']} have no image in "
            f"{folders['images']}: {_some([maps[stem] for stem in lonely])}; add them or remove the maps"
        )


def _require_labels(source: SceneSource, folder: Path) -> None:
    """Raises UserError when all maps are void throughout; usually one map is read."""
    for index in range(len(source)):
        try:
            if bool((source.label_map(index) != VOID).any()):
                return
        except BadSample:
            continue
    raise UserError(
        f"data.void: all pixels of all {len(source)} maps in {folder} are void (or unreadable); check void, "
        "first_label and num_classes"
    )


def _class_table(num_classes: int, first_label: int, void: Sequence[int]) -> np.ndarray:
    table = np.full(256, _UNKNOWN, np.int16)
    table[first_label : first_label + num_classes] = np.arange(num_classes)
    table[[*void, VOID]] = VOID
    return table


def _decode_values(content: bytes, name: str) -> np.ndarray:
    """The bytes of a PNG's pixels, uint8 [H, W], as they are stored: no palette, no scaling."""
    from PIL import Image

    height, width = image_size(content)
    if height * width > MAX_PIXELS:
        raise BadSample("too-large", f"{width} x {height} pixels, more than {MAX_PIXELS} to decode")
    # Of the header, whose place in a PNG is fixed. Pillow would stretch grey of fewer bits to 0 … 255.
    is_png = content.startswith(b"\x89PNG")
    bits, colour = (content[24], content[25]) if is_png else (0, 0)
    if not is_png or colour not in (_GREY, _PALETTE) or (colour == _GREY and bits != 8):
        kind = f"a PNG of colour type {colour} and {bits} bits" if is_png else "no PNG"
        raise UserError(
            f"data: {name} is {kind}; a label map is a PNG with one label value per pixel, of 8-bit grey or "
            "with a palette (colours would have to be translated)"
        )
    try:
        with Image.open(io.BytesIO(content), formats=("PNG",)) as image:
            return np.array(image, dtype=np.uint8)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plug-ins raise nearly every type on damaged bytes
        raise BadSample("damaged", " ".join(str(error).split()) or type(error).__name__) from None


def _some(values: Sequence[object]) -> str:
    """At most three values, and whether there are more."""
    return ", ".join(map(str, values[:3])) + (", …" if len(values) > 3 else "")
