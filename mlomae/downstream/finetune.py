"""``mlomae eval finetune``: a classifier, trained together with the encoder (He et al. 2022, app. A.2).

It trains on all labelled training images, held-out ones included; the test images are read once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from timm.data.mixup import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor, nn
from torch.nn import functional

from mlomae.data.batches import OrderedBatches, PixelBatch
from mlomae.data.subset import Subset
from mlomae.data.transforms import normalise
from mlomae.distributed import collectives
from mlomae.distributed.env import World
from mlomae.downstream.augmentation import Augmentation, AugmentConfig, AugmentedBatches
from mlomae.downstream.class_picture import COLUMNS, Guess, class_picture
from mlomae.downstream.fit import Fit
from mlomae.downstream.images import LabelledImages, with_data_of_run
from mlomae.downstream.reader import Reader, digest_of, order_of
from mlomae.downstream.sections import TrainedTaskConfig
from mlomae.errors import UserError
from mlomae.interop.pretrained import Pretrained
from mlomae.interop.vit import build_vit
from mlomae.preemption import Preemption
from mlomae.progress import Show
from mlomae.random import stream_seed
from mlomae.run_dir import RunDir
from mlomae.sections import ImagesConfig

NUM_PICTURES = 4 * COLUMNS  # test images in predictions.png
TOP = 5  # classes among which the right one is also looked for, where there are twice as many


class Config(TrainedTaskConfig):
    """One fine-tuning."""

    data: ImagesConfig | None = Field(
        None,
        description="section as of a run; what is left out, without a dataset, is that of the encoder's run",
    )
    pool: Literal["avg", "token"] = Field(
        "avg", description="of tokens, before the classifier. avg: mean of the patches; token: class token"
    )
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="before")
    @classmethod
    def _take_data_of_the_run(cls, values: Any) -> Any:
        return with_data_of_run(values)


def run(
    config: Config, pretrained: Pretrained, run_dir: RunDir, world: World, preemption: Preemption
) -> dict[str, Any]:
    """Trains and tests a classifier; called on every rank.

    Returns:
        accuracy and, with more than ten classes, top5_accuracy, in [0, 1]; loss (cross-entropy); num_test,
        num_parameters, bad_samples, epochs, seconds.

    Raises:
        UserError: data or encoder do not suit the configuration.
        Preempted: a signal asked to stop; what was trained is saved.
    """
    return Fit(Classification(config, pretrained, run_dir, world), config, run_dir, world, preemption).run()


class Classification:
    """The task for ``Fit``."""

    encoder_prefix = ""

    def __init__(self, config: Config, pretrained: Pretrained, run_dir: RunDir, world: World) -> None:
        assert config.data is not None, "Config requires it beside an encoder"
        self._config, self._world = config, world
        self._size = config.size or pretrained.img_size
        self._reader = Reader(config, config.data.workers, config.data.max_bad_share, run_dir, world)
        self._images = LabelledImages(config.data, pretrained, self._reader.ledger)
        self._train = self._images.train(self._size)
        self._order = order_of(config, "finetune", len(self._train), world)
        _require_pairs(config, self._order.local, world.size)
        self.steps_per_epoch = len(self._train) // config.optim.batch_size
        self.digest = digest_of(self._train.source.keys, self._images.num_classes)
        self._augmentation = Augmentation(config.augment, self._size, pretrained.mean)
        self._noise = _Noise(config.augment, self._images.num_classes)
        self._title = ""
        scores = {} if config.augment.mixes else {"accuracy": "accuracy {:.3f}".format}
        self.show: Show = {"": {"loss": "loss {:.4f}".format, **scores, "lr": "lr {:.2g}".format}}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(config.seed, "finetune", "weights"))
            self.model: nn.Module = build_classifier(config, pretrained, self._images.num_classes)
        self.model.to(world.device)

    def batches(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Normalised images float32 [B, C, h, w] and labels int64 [B]."""
        batches = AugmentedBatches(self._train, self._augmentation, self._order)
        for batch in self._reader.training(batches, first, self.steps_per_epoch):
            yield self._normalised(batch)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy with smoothed labels; accuracy where images are not mixed."""
        images, labels = batch
        images, targets = self._noise(images, labels)
        logits = model(images).float()
        if self._noise.mixup is not None:
            return functional.cross_entropy(logits, targets), {}
        loss = functional.cross_entropy(logits, targets, label_smoothing=self._config.augment.label_smoothing)
        return loss, {"accuracy": (logits.detach().argmax(1) == labels).float().mean()}

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Figures on the test images, of which every rank takes its share."""
        batches = OrderedBatches(self._test, self._order.local)
        top = TOP if self._images.num_classes > 2 * TOP else 1
        sums = torch.zeros(4, dtype=torch.float64, device=self._world.device)
        for batch in self._reader.testing(batches, len(batches)):
            if len(batch.indices):
                images, labels = self._normalised(batch)
                logits = model(self._cut(images)).float()
                hits = logits.topk(top, dim=1).indices == labels[:, None]
                loss = functional.cross_entropy(logits, labels, reduction="sum")
                count = torch.full_like(loss, len(labels))
                sums += torch.stack([value.double() for value in (hits[:, 0].sum(), hits.sum(), loss, count)])
        first, among, loss_sum, total = collectives.total(sums).tolist()
        num_bad = self._reader.finish()
        if not total:
            raise UserError("data.path: no image of the test set can be used; see bad_samples.jsonl")
        self._title = f"accuracy {first / total:.3f} on {total:,.0f} test images"
        return {
            "accuracy": first / total,
            **({"top5_accuracy": among / total} if top > 1 else {}),
            "loss": loss_sum / total,
            "num_test": int(total),
            "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
            "bad_samples": num_bad,
        }

    @torch.no_grad()
    def draw(self, model: nn.Module, path: Path) -> None:
        """Some test images with predicted and true classes."""
        rows = torch.linspace(0, len(self._test) - 1, min(NUM_PICTURES, len(self._test))).long()
        batch = PixelBatch.of(self._test.read_good(rows), 0, 0)
        if not len(batch.indices):
            return
        images, labels = self._normalised(batch.to(self._world.device))
        confidence, predicted = model(self._cut(images)).float().softmax(1).max(1)
        columns = self._cut(batch.pixels), predicted.tolist(), labels.tolist(), confidence.tolist()
        guesses = [Guess(*cells) for cells in zip(*columns, strict=True)]
        class_picture(path, guesses, self._images.class_names(), self._title)

    def close(self) -> None:
        """Ends loader processes, and names the bad samples that rank 0 has met."""
        self._reader.close()

    def _normalised(self, batch: PixelBatch) -> tuple[Tensor, Tensor]:
        assert batch.labels is not None
        return normalise(batch.pixels, self._train.mean, self._train.std), batch.labels

    @cached_property
    def _test(self) -> Subset:
        """The test images, at the size of which the centre is then cut out; opened when they are needed."""
        height, width = (round(side / self._config.augment.test_crop) for side in self._size)
        return self._images.test((height, width))

    def _cut(self, images: Tensor) -> Tensor:
        """The centre of test images [B, C, H, W]."""
        top, left = (
            round((have - want) / 2) for have, want in zip(images.shape[-2:], self._size, strict=True)
        )
        return images[..., top : top + self._size[0], left : left + self._size[1]]


class _Noise:
    """What is done to a whole batch on its device; draws from the generators that ``Fit`` seeds by step."""

    def __init__(self, config: AugmentConfig, num_classes: int) -> None:

        self._erase = self.mixup = None
        if config.erasing:
            self._erase = RandomErasing(config.erasing, mode="pixel")
        if config.mixes:
            smoothing = {"label_smoothing": config.label_smoothing, "num_classes": num_classes}
            self.mixup = Mixup(config.mixup, config.cutmix, **smoothing)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Images [B, C, h, w], changed in place, and targets [B], or soft ones [B, classes] if mixed."""
        if self._erase is not None:
            self._erase.device = images.device
            images = self._erase(images)
        return (images, labels) if self.mixup is None else self.mixup(images, labels)


def build_classifier(config: Config, pretrained: Pretrained, num_classes: int) -> nn.Module:
    """timm's ViT with a new classifier, whose weights are drawn from torch's generator."""
    return build_vit(
        pretrained,
        config.size,
        config.scratch,
        num_classes,
        global_pool=config.pool,
        drop_path_rate=config.optim.drop_path,
    )


def _require_pairs(config: Config, local: int, ranks: int) -> None:
    if config.augment.mixes and local % 2:
        raise UserError(
            f"optim.batch_size: {config.optim.batch_size} gives a rank {local} images, but mixup and cutmix "
            f"take them in pairs; use a multiple of {2 * ranks}, or set augment.mixup and augment.cutmix to 0"
        )
