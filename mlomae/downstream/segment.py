"""``mlomae eval segment``: a class for every pixel, by UPerNet on the encoder, which is trained with it.

Test images are resized so that they just cover ``img_size``, which is then moved over them as a window; the
scores of overlapping windows are averaged and brought to the size of the label map, where the figures are
taken.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from mlomae.data.batches import PixelBatch
from mlomae.data.dataset import VOID
from mlomae.data.decoding import MODES
from mlomae.data.scenes import ScenesConfig, open_scenes
from mlomae.data.splits import verify_files
from mlomae.data.transforms import normalise
from mlomae.distributed import collectives
from mlomae.distributed.env import World
from mlomae.downstream.confusion import Confusion
from mlomae.downstream.fit import Fit
from mlomae.downstream.joint_transforms import AugmentConfig
from mlomae.downstream.reader import Reader, digest_of, order_of
from mlomae.downstream.scene_batches import TestScenes, TrainScenes
from mlomae.downstream.scene_picture import Scene, scene_picture
from mlomae.downstream.sections import OptimConfig, TrainedTaskConfig
from mlomae.downstream.upernet import GROUP, UPerNet
from mlomae.errors import UserError
from mlomae.interop.pretrained import Pretrained
from mlomae.interop.vit import build_vit
from mlomae.preemption import Preemption
from mlomae.progress import Show
from mlomae.random import stream_seed
from mlomae.run_dir import RunDir
from mlomae.sections import NonNegative, Positive, Section

NUM_PICTURES = 4  # test images in predictions.png
MAX_WINDOWS = 8  # that go through the model at once
MAX_STEP = 2 / 3  # from window to window, in windows


class SegmentOptimConfig(OptimConfig):
    """MAE's rates for UPerNet on ADE20K."""

    batch_size: Positive = Field(16, description="global batch, summed over ranks")
    lr: NonNegative = Field(1e-4, description="highest learning rate, of what is new")
    min_lr: NonNegative = Field(0.0, description="learning rate of the last step")
    layer_decay: float = Field(
        0.65, gt=0, le=1, description="factor of the learning rate from each block to the one below it"
    )


class UPerHeadConfig(Section):
    """The head."""

    channels: Positive = Field(512, multiple_of=GROUP, description="a multiple of 16")


class Config(TrainedTaskConfig):
    """One segmentation."""

    data: ScenesConfig = ScenesConfig()
    head: UPerHeadConfig = UPerHeadConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: SegmentOptimConfig = SegmentOptimConfig()

    @model_validator(mode="after")
    def _check_path(self) -> Config:
        if self.encoder and self.data.path is None:
            raise ValueError("data.path is missing; give the folder that holds images/ and annotations/")
        return self


def run(
    config: Config, pretrained: Pretrained, run_dir: RunDir, world: World, preemption: Preemption
) -> dict[str, Any]:
    """Trains and scores; called on every rank.

    Returns:
        miou, pixel_accuracy, mean_class_accuracy and ``iou/<class>`` as of ``Confusion``; num_test,
        num_parameters, bad_samples, epochs, seconds.

    Raises:
        UserError: the data or the configuration does not suit.
        Preempted: a signal asked to stop; what was trained is saved.
    """
    task = Segmentation(config, pretrained, run_dir, world)
    return Fit(task, config, run_dir, world, preemption).run()


class Segmentation:
    """The task for ``Fit``."""

    encoder_prefix = "encoder."

    def __init__(self, config: Config, pretrained: Pretrained, run_dir: RunDir, world: World) -> None:
        self.show: Show = {"": {"loss": "loss {:.4f}".format, "lr": "lr {:.2g}".format}}
        if pretrained.in_chans not in MODES:
            raise UserError(f"encoder: takes {pretrained.in_chans} channels; image files have 1 or 3")
        self._config, self._pretrained, self._world = config, pretrained, world
        self._size = config.size or pretrained.img_size
        self._train = open_scenes(config.data, config.data.train)
        self._test = open_scenes(config.data, config.data.test)
        verify_files(self._train.files, self._test.files)
        # Now, and not after hours of training: the fields that say what labels mean cannot change in between.
        for scenes in (self._train, self._test):
            collectives.on_primary(scenes.verify)
        self._order = order_of(config, "segment", len(self._train), world)
        self.steps_per_epoch = len(self._train) // config.optim.batch_size
        self.digest = digest_of(self._train.keys, len(config.data.class_names))
        self._reader = Reader(config, config.data.workers, config.data.max_bad_share, run_dir, world)
        self._reader.ledger.expect(len(self._train) + len(self._test))
        self._title = ""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(config.seed, "segment", "weights"))
            self.model: nn.Module = self._build()
        self.model.to(world.device)

    def batches(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised crops float32 [B, C, h, w] and maps int64 [B, h, w]."""
        scenes = TrainScenes(
            self._train, self._size, self._pretrained.mean, self._config.augment, self._order
        )
        for batch in self._reader.training(scenes, first, self.steps_per_epoch):
            images, labels = self._normalised(batch)
            yield images, labels.long()

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy, averaged over the pixels that count; 0 where none does."""
        images, labels = batch
        summed = functional.cross_entropy(model(images).float(), labels, ignore_index=VOID, reduction="sum")
        return summed / (labels != VOID).sum().clamp(min=1), {}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Figures on the test images, of which every rank takes its share."""
        world, names = self._world, self._config.data.class_names
        confusion = Confusion(len(names), world.device)
        count = torch.zeros((), dtype=torch.int64, device=world.device)
        for batch in self._reader.testing(self._scenes(), len(self._test)):
            if batch.labels is not None:
                image, labels = self._normalised(batch)
                confusion.add(self._predict(model, image, labels.shape[-2:]), labels[0])
                count += 1
        confusion.reduce()
        num_test = int(collectives.total(count))
        num_bad = self._reader.finish()
        if not num_test:
            raise UserError("data.path: no image of the test set can be used; see bad_samples.jsonl")
        figures = confusion.figures(names)
        self._title = f"mIoU {figures['miou']:.3f} on {num_test:,} test images"
        return {
            **figures,
            "num_test": num_test,
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "bad_samples": num_bad,
        }

    @torch.no_grad()
    def draw(self, model: nn.Module, path: Path) -> None:
        """Some test images with their true and predicted classes."""
        scenes, shown = self._scenes(), []
        for number in torch.linspace(0, len(self._test) - 1, NUM_PICTURES).long().unique().tolist():
            batch = scenes.read(number)
            if batch.labels is not None:
                image, truth = self._test.scene(number, self._pretrained.in_chans)
                predicted = self._predict(
                    model, self._normalised(batch.to(self._world.device))[0], truth.shape
                )
                shown.append(Scene(image, truth, predicted.to(torch.uint8).cpu()))
        scene_picture(path, shown, self._config.data.class_names, self._title)

    def close(self) -> None:
        """Ends loader processes, and names the bad samples that rank 0 has met."""
        self._reader.close()

    def _scenes(self) -> TestScenes:
        return TestScenes(self._test, self._size, self._pretrained.in_chans)

    def _build(self) -> UPerNet:
        config = self._config
        encoder = build_vit(
            self._pretrained, self._size, config.scratch, drop_path_rate=config.optim.drop_path
        )
        return UPerNet(encoder, config.head.channels, len(config.data.class_names))

    def _normalised(self, batch: PixelBatch) -> tuple[Tensor, Tensor]:
        assert batch.labels is not None
        return normalise(batch.pixels, self._pretrained.mean, self._pretrained.std), batch.labels

    def _predict(self, model: nn.Module, image: Tensor, size: tuple[int, ...]) -> Tensor:
        """Class numbers int64 [H, W] of one image [1, C, h, w], at ``size`` (H, W)."""
        scores = window_scores(model, image[0], self._size)
        return functional.interpolate(scores[None], size=list(size), mode="bilinear")[0].argmax(dim=0)


def window_scores(model: nn.Module, image: Tensor, size: tuple[int, int]) -> Tensor:
    """Scores float32 [K, h, w] of an image [C, h, w] that is at least as large as the windows.

    Windows of ``size`` lie evenly, at most MAX_STEP of their side apart.
    """
    corners = list(itertools.product(*(_starts(*pair) for pair in zip(image.shape[-2:], size, strict=True))))
    summed, covered = torch.zeros(()), torch.zeros(image.shape[-2:], device=image.device)
    for first in range(0, len(corners), MAX_WINDOWS):
        parts = [
            (..., slice(top, top + size[0]), slice(left, left + size[1]))
            for top, left in corners[first : first + MAX_WINDOWS]
        ]
        scores = model(torch.stack([image[part] for part in parts])).float()
        if not summed.ndim:
            summed = scores.new_zeros(scores.shape[1], *image.shape[-2:])
        for part, score in zip(parts, scores, strict=True):
            summed[part] += score
            covered[part] += 1
    return summed / covered


def _starts(length: int, window: int) -> list[int]:
    steps = -(-(length - window) // max(1, int(window * MAX_STEP)))
    return [round(step * (length - window) / max(steps, 1)) for step in range(steps + 1)]
