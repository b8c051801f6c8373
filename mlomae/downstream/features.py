"""Features of a frozen encoder: computed once by all ranks, kept in files, read by all evaluations."""

from __future__ import annotations

import fcntl
import hashlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor

from mlomae.bad_samples import BadSamples
from mlomae.data.batches import Batch, OrderedBatches, PixelBatch, iterate
from mlomae.data.faults import Fault
from mlomae.data.ledger import FaultLedger
from mlomae.data.loader import Part
from mlomae.data.stream import upload_ahead
from mlomae.data.subset import Subset
from mlomae.distributed import collectives
from mlomae.distributed.env import World
from mlomae.downstream.feature_set import PARTS, FeatureSet, gather_features
from mlomae.downstream.images import LabelledImages, with_data_of_run
from mlomae.downstream.sections import TaskConfig
from mlomae.errors import UserError
from mlomae.interop.pretrained import Pool, Pretrained
from mlomae.interop.vit import build_vit
from mlomae.models.encoder import pool_features
from mlomae.precision import resolve_precision, set_float32_products
from mlomae.progress import Progress, say
from mlomae.random import stream_seed
from mlomae.run_dir import RunDir
from mlomae.sections import Display, ImagesConfig, Positive
from mlomae.tensor_file import read_tensors, write_tensors

# Fields of the data section that change no feature.
_IRRELEVANT = {"download", "max_bad_share", "workers"}
_SECONDS_BETWEEN_LINES = 10.0  # of progress


class FeaturesConfig(TaskConfig):
    """What every evaluation of frozen features needs to know."""

    pool: Pool | None = Field(
        None, description="cls | mean | cls+mean: features of the tokens. None: as pretrained"
    )
    encoder_batch: Positive = Field(256, description="images in a pass of the encoder")
    data: ImagesConfig | None = Field(
        None,
        description="section as of a run; what is left out, without a dataset, is that of the encoder's run",
    )

    @model_validator(mode="before")
    @classmethod
    def _take_data_of_the_run(cls, values: Any) -> Any:
        return with_data_of_run(values)


@dataclass(frozen=True)
class Collected:
    """What an evaluation of frozen features begins with.

    Attributes:
        parts: on the CPU; empty but on rank 0.
        classes: number of them; on rank 0.
        bad_samples: images that could not be used; on rank 0.
        digest: of all that the features depend on.
    """

    parts: Mapping[Part, FeatureSet]
    classes: int
    bad_samples: int
    digest: str


def load_features(config: FeaturesConfig, pretrained: Pretrained, run_dir: RunDir, world: World) -> Collected:
    """The features of all parts; called on every rank.

    They are kept in a folder beside the results, a file per part, and only computed where a file is missing:
    other evaluations of the same encoder and images, and a command that is repeated, find them there. The
    folder's name tells configuration and weights; images that change in their place do not change it.

    Raises:
        UserError: the images do not suit the encoder, lack labels, or too many are bad; or a file is damaged.
    """
    assert config.data is not None, "FeaturesConfig requires it beside an encoder"
    precision = resolve_precision(config.precision, world.device, None, "precision")
    set_float32_products(precision)
    digest = _digest(config, pretrained, precision)
    folder = run_dir.path.parent / f"features-{digest}"
    ledger = FaultLedger(config.data.max_bad_share)
    bad_samples = BadSamples(ledger, run_dir.bad_samples)
    bad_samples.restore()
    missing = collectives.broadcast_object([part for part in PARTS if not _file(folder, part).exists()])
    if missing:
        # Before the folder is made: bad input leaves nothing behind.
        collector = _Collector(config, pretrained, precision, world)
        with _locked(folder):
            for part in missing:
                collector.collect(part, _file(folder, part))
    parts: dict[Part, FeatureSet] = {}
    classes: list[int] = []

    def read() -> None:
        for part in PARTS:
            parts[part], known = _read(_file(folder, part))
            ledger.expect(known["samples"] - ledger.num_samples)
            ledger.note(Fault(**fault) for fault in known["faults"])
            classes.append(known["classes"])
        counts = ", ".join(f"{len(parts[part]):,} {part}" for part in PARTS)
        say(config.display, f"features: {counts} images in {folder}")

    collectives.on_primary(read)
    bad_samples.exchange()
    return Collected(parts, max(classes, default=0), len(ledger), digest)


class _Parts(LabelledImages):
    """Labelled training images, held-out images and test images, one set at a time."""

    def part(self, part: Part, size: tuple[int, int]) -> tuple[Subset, list[Fault]]:
        """A set at a size (height, width), and the bad samples that its shards' headers showed."""
        if part == "test":
            subset = self.test(size)
        else:
            subset = self._subset(self._dataset.train, getattr(self._splits, part), size)
        return subset, self._ledger.take_new()


class _Collector:
    """Computes features and writes them into files; on all ranks together."""

    def __init__(self, config: FeaturesConfig, pretrained: Pretrained, precision: str, world: World) -> None:
        assert config.data is not None
        self._config, self._world, self._size = config, world, config.size or pretrained.img_size
        self._workers, self._bf16 = config.data.workers, precision == "bf16"
        self._pool = config.pool or pretrained.pool
        self._ledger = FaultLedger(config.data.max_bad_share)
        self._images = _Parts(config.data, pretrained, self._ledger)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(config.seed, "scratch"))
            vit = build_vit(pretrained, self._size, config.scratch)
        self._vit = vit.to(world.device).eval()

    def collect(self, part: Part, path: Path) -> None:
        """Writes the features of one part.

        Raises:
            UserError: too many of its images are bad, or all of them.
        """
        subset, faults = self._images.part(part, self._size)
        number = -(-len(subset) // self._config.encoder_batch)
        rounds: Iterable[Batch | None] = self._rounds(subset, number, faults)
        if self._world.primary:
            say(self._config.display, f"features: computing those of {len(subset):,} {part} images")
            images = self._config.encoder_batch * self._world.size
            rounds = _shown(rounds, -(-number // self._world.size), images, self._config.display)
        found = gather_features(self._encode, rounds, len(subset), self._world)
        met = collectives.gather_object(faults)

        def write() -> None:
            assert found is not None and met is not None
            known = [fault for rank in met for fault in rank]
            self._ledger.add(known)
            if not len(found):
                reason = f"; the first one: {known[0].key} ({known[0].reason})" if known else ""
                raise UserError(f"data.path: no image of the {part} set can be used{reason}")
            state = {
                "samples": self._ledger.num_samples,
                "classes": self._images.num_classes,
                "faults": [asdict(fault) for fault in known],
            }
            write_tensors(path, {"features": found.features, "labels": found.labels}, state)

        collectives.on_primary(write)

    def _rounds(self, subset: Subset, number: int, faults: list[Fault]) -> Iterator[Batch | None]:
        """This rank's batches of ``number`` in all; what is bad is added to ``faults``."""
        world, batches = self._world, OrderedBatches(subset, self._config.encoder_batch)
        on_gpu = world.device.type == "cuda"
        own: Iterator[PixelBatch] = iterate(
            batches, range(world.rank, number, world.size), self._workers, pin=on_gpu
        )
        if on_gpu:
            own = upload_ahead(own, world.device)
        for _ in range(-(-number // world.size)):
            batch = next(own, None)
            if batch is not None:
                faults.extend(batch.faults)
            yield batch.normalised(subset) if batch is not None and len(batch.indices) else None

    def _encode(self, images: Tensor) -> Tensor:
        device = self._world.device.type
        with torch.autocast(device, torch.bfloat16) if self._bf16 else nullcontext():
            return pool_features(self._vit.forward_features(images), self._pool)


def _shown(
    rounds: Iterable[Batch | None], total: int, images: int, display: Display
) -> Iterator[Batch | None]:
    """The same, with a line now and then that tells how far it is; ``images`` belong to a round."""
    progress = Progress(total, 0, {"": {"images_per_second": "{:,.0f} img/s".format}}, display)
    began = last = time.monotonic()
    try:
        for number, batch in enumerate(rounds, 1):
            yield batch
            now = time.monotonic()
            if now - last >= _SECONDS_BETWEEN_LINES or number == total:
                last = now
                progress.log(number, {"images_per_second": number * images / max(now - began, 1e-9)})
    finally:
        progress.close()


def _digest(config: FeaturesConfig, pretrained: Pretrained, precision: str) -> str:
    """Of all that the features depend on: 16 hex digits."""
    assert config.data is not None
    what = {
        "encoder": config.fingerprint,
        "drawn": config.seed if config.scratch else None,
        "size": config.size or pretrained.img_size,
        "pool": config.pool or pretrained.pool,
        "mean": pretrained.mean,
        "std": pretrained.std,
        "precision": precision,
        "data": config.data.model_dump(mode="json", exclude=_IRRELEVANT),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:16]


def _file(folder: Path, part: Part) -> Path:
    return folder / f"{part}.safetensors"


def _read(path: Path) -> tuple[FeatureSet, dict[str, Any]]:
    """One part's features, and what was written down about them.

    Raises:
        UserError: the file is damaged or holds something else.
    """
    tensors, known = read_tensors(path) or ({}, {})
    if tensors.keys() != {"features", "labels"} or known.keys() != {"samples", "classes", "faults"}:
        raise UserError(f"{path}: found no features and labels in it; delete it to compute them anew")
    return FeatureSet(tensors["features"], tensors["labels"]), known


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keeps another command from writing the same files; called on every rank.

    Raises:
        UserError: another one does that now.
    """
    held: list[Any] = []

    def lock() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a")  # noqa: SIM115 - held in the context
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise UserError(f"{folder}: another process computes these features; wait for it") from None
        held.append(file)

    collectives.on_primary(lock)
    try:
        yield
    finally:
        for file in held:
            file.close()
