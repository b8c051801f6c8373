"""Fine-tuning: it learns, reports what its model does, and goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_digits
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mlomae.config import load_tree
from mlomae.data.dataset import Dataset, TensorSource
from mlomae.distributed.env import join_world, leave_world
from mlomae.downstream import images as images_module
from mlomae.downstream.class_picture import Guess, class_picture
from mlomae.downstream.finetune import Classification, Config
from mlomae.downstream.images import LabelledImages
from mlomae.interop.reading import read_pretrained
from tests.distributed.ranks import run_ranks
from tests.downstream.fine_tuning import config_of, finetune, task_of

RECIPES = Path(__file__).parents[2] / "recipes" / "finetune"


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_digits_are_learned(digits_run: Path, tmp_path: Path) -> None:
    optim = {"epochs": 12, "batch_size": 32, "lr": 5e-3, "layer_decay": 1.0, "clip": 1.0}

    figures = finetune(tmp_path, config_of(digits_run, optim=optim, log_every=22))

    assert figures["accuracy"] > 0.9
    found = losses(tmp_path)
    assert found[-1] < 0.2 * found[0]


def test_figures_are_those_of_the_saved_model(colour_run: Path, tmp_path: Path) -> None:
    """Computed again with timm and Pillow alone."""
    config = config_of(colour_run)
    figures = finetune(tmp_path, config)
    pretrained = read_pretrained(colour_run)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=3, global_pool="avg"
    )
    model.load_state_dict(load_file(tmp_path / "model.safetensors"))
    folder = Path(str(config.data.path)) / "test" if config.data else Path()
    names = sorted(folder.glob("*/*.png"))
    classes = sorted({name.parent.name for name in names})
    pixels = np.stack([np.asarray(Image.open(name)) for name in names])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (pretrained.mean, pretrained.std))
    labels = torch.tensor([classes.index(name.parent.name) for name in names])

    with torch.no_grad():
        logits = model.eval()((images - mean) / std)

    assert figures["num_test"] == len(names) == 18
    assert figures["accuracy"] == pytest.approx(float((logits.argmax(1) == labels).float().mean()))
    assert figures["loss"] == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits, labels)), rel=1e-4
    )
    assert figures["num_parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert "top5_accuracy" not in figures
    assert losses(tmp_path)[-1] < losses(tmp_path)[0]
    with Image.open(tmp_path / "predictions.png") as picture:
        assert picture.width > 1000 and picture.height > 500


STRONG = {
    "crop": "resized", "flip": True, "rand_augment": "rand-m9-mstd0.5-inc1", "erasing": 0.5, "mixup": 0.8,
    "cutmix": 1.0, "label_smoothing": 0.1,
}  # fmt: skip


def test_a_killed_fine_tuning_ends_like_an_undisturbed_one(
    colour_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(colour_run, augment=STRONG, optim={"drop_path": 0.2, "ema": 0.9})
    expected = finetune(tmp_path / "whole", config)
    loss = Classification.loss
    steps: list[int] = []

    def die(self: Classification, *args: Any) -> Any:
        steps.append(len(steps))
        if len(steps) == 5:  # in the second epoch of three steps
            raise KeyboardInterrupt
        return loss(self, *args)

    monkeypatch.setattr(Classification, "loss", die)
    with pytest.raises(KeyboardInterrupt):
        finetune(tmp_path / "killed", config)
    found = finetune(tmp_path / "killed", config)

    assert len(steps) == 5 + 3
    timings = ("seconds",)
    assert {k: v for k, v in found.items() if k not in timings} == {
        k: v for k, v in expected.items() if k not in timings
    }
    for name in ("checkpoint.safetensors", "model.safetensors"):
        left, right = load_file(tmp_path / "whole" / name), load_file(tmp_path / "killed" / name)
        assert left.keys() == right.keys()
        assert [key for key in left if not torch.equal(left[key], right[key])] == []


def test_losses_are_those_of_timm(colour_run: Path, tmp_path: Path) -> None:
    plain = task_of(colour_run, tmp_path, augment={"label_smoothing": 0.1})
    images, labels = next(plain.batches(0))
    logits = plain.model(images)

    loss, scalars = plain.loss(plain.model, (images.clone(), labels))

    torch.testing.assert_close(loss, LabelSmoothingCrossEntropy(0.1)(logits, labels))
    assert scalars["accuracy"] == (logits.argmax(1) == labels).float().mean()

    mixing = task_of(colour_run, tmp_path, augment={"mixup": 1.0, "label_smoothing": 0.1})
    seen: list[Tensor] = []

    def model(mixed: Tensor) -> Tensor:
        seen.append(mixed.clone())
        return mixing.model(mixed)

    loss, scalars = mixing.loss(model, (images.clone(), labels))  # type: ignore[arg-type]
    lam = ((seen[0] - images.flip(0)).norm() / (images - images.flip(0)).norm()).detach()
    one_hot = torch.full((16, 3), 0.1 / 3).scatter(1, labels[:, None], 0.9 + 0.1 / 3)
    target = lam * one_hot + (1 - lam) * one_hot.flip(0)
    torch.testing.assert_close(loss, SoftTargetCrossEntropy()(mixing.model(seen[0]), target))
    assert scalars == {}


def test_erasing_fills_boxes_with_noise(colour_run: Path, tmp_path: Path) -> None:
    task = task_of(colour_run, tmp_path, augment={"erasing": 1.0})
    images, labels = next(task.batches(0))
    seen: list[Tensor] = []

    def model(erased: Tensor) -> Tensor:
        seen.append(erased.clone())
        return task.model(erased)

    task.loss(model, (images.clone(), labels))  # type: ignore[arg-type]

    share = (seen[0] != images).any(dim=1).float().mean(dim=(1, 2))
    assert len(share) == 16 and float(share.min()) > 0.01 and float(share.max()) < 0.4


def test_all_labelled_images_are_trained_on_and_no_test_image(digits_run: Path, tmp_path: Path) -> None:
    task = task_of(digits_run, tmp_path, optim={"batch_size": 64})
    train, test = task._train.indices, task._images.test((8, 8)).indices

    assert sorted(torch.cat([train, test]).tolist()) == list(range(len(load_digits().target)))
    assert 0.15 < len(test) / 1797 < 0.25
    assert task.steps_per_epoch == len(train) // 64


def test_with_many_classes_the_first_five_count_too(
    colour_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = [number % 12 for number in range(48)]
    generator = torch.Generator().manual_seed(0)
    source = TensorSource(
        [str(number) for number in range(48)],
        torch.randint(0, 256, (48, 3, 32, 32), dtype=torch.uint8, generator=generator),
        torch.tensor(labels),
    )
    opened = Dataset(source, 12, (0.5,) * 3, (0.5,) * 3, lambda: source)
    monkeypatch.setattr(images_module, "open_dataset", lambda *_: opened)
    task = task_of(colour_run, tmp_path)
    torch.nn.init.normal_(task.model.get_parameter("head.weight"))
    task.model.eval()

    with torch.no_grad():
        figures = task.evaluate(task.model)
        mean, std = (torch.tensor(values)[:, None, None] for values in (task._test.mean, task._test.std))
        ranking = task.model((source.stack / 255 - mean) / std).argsort(dim=1, descending=True).tolist()

    hits = [order.index(label) for order, label in zip(ranking, labels, strict=True)]
    assert figures["accuracy"] == sum(hit == 0 for hit in hits) / 48
    assert figures["top5_accuracy"] == sum(hit < 5 for hit in hits) / 48
    assert figures["accuracy"] < figures["top5_accuracy"] < 1


def test_the_test_set_stays_closed_until_the_end(
    colour_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[int] = []
    open_test = LabelledImages.test

    def watch(self: LabelledImages, size: tuple[int, int]) -> Any:
        opened.append(len(losses(tmp_path)))
        return open_test(self, size)

    monkeypatch.setattr(LabelledImages, "test", watch)
    finetune(tmp_path, config_of(colour_run))

    assert opened == [6]  # after the last step


def test_from_scratch_nothing_of_the_encoder_is_used(colour_run: Path, tmp_path: Path) -> None:
    encoder = load_file(colour_run / "encoder.safetensors")["blocks.0.attn.qkv.weight"]

    def first(**fields: Any) -> Tensor:
        weights: Mapping[str, Tensor] = task_of(colour_run, tmp_path, **fields).model.state_dict()
        return weights["blocks.0.attn.qkv.weight"]

    assert torch.equal(first(), encoder)
    assert not torch.equal(first(scratch=True), encoder)
    assert torch.equal(first(scratch=True), first(scratch=True))
    assert not torch.equal(first(scratch=True), first(scratch=True, seed=1))


def test_the_centre_of_test_images_is_cut_out(colour_run: Path, tmp_path: Path) -> None:
    task = task_of(colour_run, tmp_path, augment={"test_crop": 0.5}, img_size=16)

    assert task._test.size == (32, 32)
    image = torch.arange(32 * 32).view(1, 1, 32, 32)
    assert torch.equal(task._cut(image), image[..., 8:24, 8:24])


def test_pool_token_has_a_norm_before_the_classifier(colour_run: Path, tmp_path: Path) -> None:
    task = task_of(colour_run, tmp_path, pool="token")
    norm = load_file(colour_run / "encoder.safetensors")["norm.weight"]

    assert torch.equal(task.model.state_dict()["norm.weight"], norm)
    assert "fc_norm.weight" not in task.model.state_dict()


def test_classes_are_called_by_their_folders(colour_run: Path, digits_run: Path, tmp_path: Path) -> None:
    digits = task_of(digits_run, tmp_path)

    assert task_of(colour_run, tmp_path)._images.class_names() == ("blue", "green", "red")
    assert digits._images.class_names() == tuple("0123456789")


def test_the_picture_marks_what_is_wrong(tmp_path: Path) -> None:
    image = torch.full((3, 8, 8), 128, dtype=torch.uint8)

    def red(truth: int) -> int:
        class_picture(tmp_path / "p.png", [Guess(image, 0, truth, 0.7)], ["a", "b"], "title")
        with Image.open(tmp_path / "p.png") as picture:
            r, g, b = np.moveaxis(np.asarray(picture.convert("RGB")), 2, 0)
        return int(((r > 180) & (g < 60) & (b < 60)).sum())

    assert red(truth=1) > 500 and red(truth=0) == 0


def as_a_rank(config_text: str, folder: str) -> dict[str, Any]:
    """One rank of a fine-tuning; its figures."""
    torch.use_deterministic_algorithms(True)
    world = join_world("cpu")
    try:
        return finetune(Path(folder), Config.model_validate(yaml.safe_load(config_text)), world)
    finally:
        leave_world()


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_do_what_one_does(colour_run: Path, tmp_path: Path) -> None:
    config = config_of(colour_run)
    alone = finetune(tmp_path / "one", config)
    text = yaml.safe_dump(config.model_dump(mode="json"))

    together, _ = run_ranks(2, as_a_rank, text, str(tmp_path / "two"))

    assert together["accuracy"] == alone["accuracy"] and together["num_test"] == alone["num_test"]
    assert together["loss"] == pytest.approx(alone["loss"], rel=1e-4)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    for name, value in left.items():
        torch.testing.assert_close(right[name], value, rtol=1e-3, atol=2e-4)


@pytest.mark.parametrize("recipe", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_load(recipe: Path) -> None:
    config = load_tree(recipe, {}, Config)

    assert config.data is not None and config.data.path is not None
    assert config.optim.batch_size % 2 == 0


def test_a_section_without_a_data_set_changes_that_of_the_run(colour_run: Path, digits_run: Path) -> None:
    config = config_of(colour_run, data={"workers": 3})
    other = config_of(colour_run, data={"dataset": "digits"})

    assert config.data is not None and other.data is not None
    assert (config.data.dataset, config.data.workers) == ("folder", 3)
    assert (other.data.dataset, other.data.path) == ("digits", None)
