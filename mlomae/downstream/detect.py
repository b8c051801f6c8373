"""``mlomae eval detect``: Faster R-CNN on a simple feature pyramid of the encoder (Li et al. 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from mlomae.data.boxes import BoxesConfig, open_boxes
from mlomae.data.decoding import MODES
from mlomae.data.splits import verify_files
from mlomae.distributed import collectives
from mlomae.distributed.env import World
from mlomae.downstream.average_precision import Found, average_precision
from mlomae.downstream.box_batches import BoxBatch, ScoredBoxes, TrainingBoxes
from mlomae.downstream.box_transforms import BoxAugmentConfig, Size
from mlomae.downstream.fit import Fit
from mlomae.downstream.reader import Reader, digest_of, order_of
from mlomae.downstream.sections import OptimConfig, TrainedTaskConfig
from mlomae.errors import UserError
from mlomae.interop.pretrained import Pretrained
from mlomae.preemption import Preemption
from mlomae.progress import Show
from mlomae.random import stream_seed
from mlomae.run_dir import RunDir
from mlomae.sections import NonNegative, Positive, Section

PICTURED = 6  # test images in predictions.png


class DetectOptimConfig(OptimConfig):
    """ViTDet's rates for ViT-B on COCO."""

    batch_size: Positive = Field(64, description="global batch, summed over ranks")
    lr: NonNegative = Field(1e-4, description="highest learning rate, of what is new")
    weight_decay: NonNegative = Field(0.1, description="of matrices only")
    layer_decay: float = Field(
        0.7, gt=0, le=1, description="factor of the learning rate from each block to the one below it"
    )


class DetectorConfig(Section):
    """What is built on the encoder; the defaults are those for COCO."""

    out_channels: Positive = Field(256, description="of the feature pyramid")
    hidden: Positive = Field(1024, description="width of the layers that tell the class of a box")
    samples: Positive = Field(512, description="boxes per image that these layers are trained on")
    proposals: Positive = Field(1000, description="boxes per image that they are asked about")


class Config(TrainedTaskConfig):
    """``mlomae eval detect``; ``img_size`` is the frame into which images are fitted, in their own shape."""

    data: BoxesConfig = BoxesConfig()
    head: DetectorConfig = DetectorConfig()
    augment: BoxAugmentConfig = BoxAugmentConfig()
    optim: DetectOptimConfig = DetectOptimConfig()

    @model_validator(mode="after")
    def _check_data(self) -> Config:
        if self.encoder and self.data.path is None:
            raise ValueError("data.path is missing; give the folder that holds the images and annotations")
        if self.data.train == self.data.test:
            raise ValueError(f"data.test is {self.data.test!r}, as data.train is; name another split")
        return self


def run(
    config: Config, pretrained: Pretrained, run_dir: RunDir, world: World, preemption: Preemption
) -> dict[str, Any]:
    """Trains a detector and scores it on the test split.

    Returns:
        ap, ap50, ap75, ap_small, ap_medium, ap_large, ap/NAME of each category (``average_precision``),
        num_test, bad_samples, and what training cost.

    Raises:
        UserError: the data or the encoder does not suit the task.
    """
    task = DetectTask(config, pretrained, run_dir, world)
    return Fit(task, config, run_dir, world, preemption).run()


class DetectTask:
    """What ``Fit`` needs to know (``mlomae.downstream.fit.Task``).

    Raises:
        UserError: the data or the encoder does not suit the task.
    """

    encoder_prefix = "backbone.encoder."

    def __init__(self, config: Config, pretrained: Pretrained, run_dir: RunDir, world: World) -> None:
        self.show: Show = {"": {"loss": "loss {:.4f}".format, "lr": "lr {:.2e}".format}}
        self._config, self._in_chans, self._world = config, pretrained.in_chans, world
        self._frame = frame_of(config.size or pretrained.img_size, pretrained.patch_size)
        if pretrained.in_chans not in MODES:
            raise UserError(f"encoder: {pretrained.in_chans} channels do not suit image files; use 3 or 1")
        self._train, self._test = open_boxes(config.data)
        verify_files(self._train.files, self._test.files)
        self._order = order_of(config, "detect", len(self._train), world)
        self.steps_per_epoch = len(self._train) // config.optim.batch_size
        self.digest = digest_of(self._train.keys, len(self._train.categories))
        self._reader = Reader(config, config.data.workers, config.data.max_bad_share, run_dir, world)
        for source in (self._train, self._test):
            self._reader.ledger.expect(len(source))
            self._reader.ledger.add(source.faults)
        self.model: nn.Module = self._build(pretrained)

    def batches(self, first: int) -> Iterator[BoxBatch]:
        """This rank's share of batch ``first`` and all that follow, without end, on the device."""
        batches = TrainingBoxes(self._train, self._frame, self._in_chans, self._config.augment, self._order)
        return self._reader.training(batches, first, self.steps_per_epoch)

    def loss(self, model: nn.Module, batch: BoxBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of torchvision's four losses, and each of them."""
        losses: dict[str, Tensor] = model(batch.images(), batch.targets())
        scalars = {f"loss/{name.removeprefix('loss_')}": value.detach() for name, value in losses.items()}
        return torch.stack(list(losses.values())).sum(), scalars

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Figures of ``average_precision``; every rank looks at its share of the test images."""
        batches = self._scored(range(len(self._test)))
        found_here = list(self._detect(model, self._reader.testing(batches, len(batches))))
        gathered = collectives.gather_object(found_here)
        num_bad = self._reader.finish()
        if not collectives.total(torch.tensor(len(found_here), device=self._world.device)):
            raise UserError("data.path: no image of the test set can be used; see bad_samples.jsonl")
        if gathered is None:
            return {}
        found = sorted((entry for part in gathered for entry in part), key=lambda entry: entry.index)
        figures = average_precision(self._test, found)
        self._title = f"AP {figures['ap']:.3f} on {len(found)} test images"
        return {**figures, "num_test": len(found), "bad_samples": num_bad}

    def draw(self, model: nn.Module, path: Path) -> None:
        """Some test images, with what is found and what is there."""
        from mlomae.downstream.box_picture import Panel, box_picture

        chosen = torch.linspace(0, len(self._test) - 1, PICTURED).long().unique().tolist()
        with torch.no_grad():
            batch = self._scored(chosen, len(chosen)).read(0).to(self._world.device)
            found = list(self._detect(model, [batch]))
        panels = [
            Panel(
                self._test.image(entry.index, self._in_chans).permute(1, 2, 0).numpy(),
                entry,
                self._test.objects(entry.index).boxes.numpy(),
            )
            for entry in found
        ]
        if panels:
            box_picture(path, panels, self._test.categories, self._title)

    def close(self) -> None:
        """Ends loader processes, and names the bad samples that rank 0 has met."""
        self._reader.close()

    def _build(self, pretrained: Pretrained) -> nn.Module:
        from mlomae.downstream.detector import build_detector
        from mlomae.interop.vit import build_vit

        config = self._config
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(config.seed, "detect", "weights"))
            encoder = build_vit(
                pretrained, self._frame, config.scratch, drop_path_rate=config.optim.drop_path
            )
            classes = len(self._train.categories)
            model = build_detector(
                encoder, classes, pretrained.mean, pretrained.std, **config.head.model_dump()
            )
        return model.to(self._world.device)

    def _scored(self, indices: Sequence[int], batch: int | None = None) -> ScoredBoxes:
        return ScoredBoxes(self._test, self._frame, self._in_chans, indices, batch or self._order.local)

    def _detect(self, model: nn.Module, batches: Iterable[BoxBatch]) -> Iterator[Found]:
        """What the model finds in some test images; bad ones are left out."""
        for batch in batches:
            outputs = model(batch.images()) if batch.sizes else []
            for index, size, output in zip(batch.indices.tolist(), batch.sizes, outputs, strict=True):
                height, width = self._test.sizes[index]
                scale = torch.tensor([width / size[1], height / size[0]] * 2)
                boxes, scores, labels = (output[name].cpu() for name in ("boxes", "scores", "labels"))
                yield Found(index, (boxes * scale).numpy(), scores.numpy(), labels.numpy())


def frame_of(size: Size, patch_size: int) -> Size:
    """The smallest frame that holds ``size`` and that the pyramid divides evenly: multiples of four patches.

    Raises:
        UserError: the patch size is no power of two, 4 or more, as the pyramid's scales ask for.
    """
    if patch_size < 4 or patch_size & (patch_size - 1):
        raise UserError(
            f"encoder: its patch size is {patch_size}; detection needs a power of two, 4 or more, as 8 or 16"
        )
    step = 4 * patch_size
    return -(-size[0] // step) * step, -(-size[1] // step) * step
