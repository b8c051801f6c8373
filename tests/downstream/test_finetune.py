"""Fine-tuning: it learns, reports what its model does, and goes on where it stopped."""

from __future__ import annotations

import json
import shutil
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
from mlomae.data.ledger import FaultLedger
from mlomae.distributed.env import World, join_world, leave_world
from mlomae.downstream import images as images_module
from mlomae.downstream.class_picture import Guess, class_picture
from mlomae.downstream.finetune import Classification, Config, run
from mlomae.downstream.images import LabelledImages
from mlomae.errors import UserError
from mlomae.interop.reading import read_pretrained
from mlomae.preemption import Preemption
from mlomae.run_dir import RunDir
from mlomae.sections import ImagesConfig
from tests.distributed.ranks import run_ranks

RECIPES = Path(__file__).parents[2] / "recipes" / "finetune"
ONE = World(0, 1, torch.device("cpu"))
PLAIN = {
    "crop": "none",
    "flip": False,
    "rand_augment": "none",
    "erasing": 0,
    "mixup": 0,
    "cutmix": 0,
    "label_smoothing": 0,
}
OPTIM = {"epochs": 2, "batch_size": 16, "lr": 3e-3, "layer_decay": 0.9, "drop_path": 0}


def config_of(encoder: Path, **sections: Any) -> Config:
    """Two plain epochs in batches of sixteen, but for what ``sections`` change."""
    tree: dict[str, Any] = {"encoder": str(encoder), "device": "cpu", "log_every": 1, **sections}
    tree["optim"] = {**OPTIM, **tree.get("optim", {})}
    tree["augment"] = {**PLAIN, **tree.get("augment", {})}
    return Config.model_validate(tree)


def finetune(folder: Path, config: Config, world: World = ONE) -> dict[str, Any]:
    run_dir = RunDir(folder, config)
    if world.primary:
        run_dir.claim(primary=True)
    try:
        with Preemption() as preemption:
            return run(config, read_pretrained(Path(config.encoder)), run_dir, world, preemption)
    finally:
        run_dir.release()


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


def task_of(encoder: Path, folder: Path, world: World = ONE, **sections: Any) -> Classification:
    config = config_of(encoder, **sections)
    return Classification(config, read_pretrained(encoder), RunDir(folder, config), world)


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


@pytest.fixture
def damaged(colour_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """The data section of a copy in which one training and one test image are cut off."""
    folder = tmp_path / "damaged"
    shutil.copytree(colour_folder, folder)
    for name in ("train/red/03.png", "test/blue/01.png"):
        (folder / name).write_bytes((folder / name).read_bytes()[:500])
    return {"dataset": "folder", "path": str(folder), "max_bad_share": 0.1}


def test_bad_samples_are_passed_over_and_named(
    colour_run: Path, tmp_path: Path, damaged: dict[str, Any]
) -> None:
    figures = finetune(tmp_path / "out", config_of(colour_run, data=damaged, optim={"batch_size": 60}))

    rows = [json.loads(line) for line in (tmp_path / "out" / "bad_samples.jsonl").read_text().splitlines()]
    assert [row["key"] for row in rows] == ["red/03.png", "blue/01.png"]
    assert figures["bad_samples"] == 2 and figures["num_test"] == 17


def test_too_many_bad_samples_end_it(colour_run: Path, tmp_path: Path, damaged: dict[str, Any]) -> None:
    data = {**damaged, "max_bad_share": 0.0}

    with pytest.raises(UserError, match=r"data\.max_bad_share: 1 of 60 samples are bad"):
        finetune(tmp_path / "out", config_of(colour_run, data=data, optim={"batch_size": 60}))
    assert "red/03.png" in (tmp_path / "out" / "bad_samples.jsonl").read_text()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optim": {"batch_size": 61}}, r"optim\.batch_size: 61 exceeds the 60 training images; lower it"),
        ({"optim": {"batch_size": 15}, "augment": {"mixup": 0.8}}, r"in pairs; use a multiple of 2"),
        ({"data": {"dataset": "digits"}}, r"digits has 1 channel, but .* takes 3; choose"),
        ({"img_size": 30}, r"img_size: \[30, 30\] is not divisible by the encoder's patch size 8"),
    ],
)
def test_what_does_not_fit_is_one_line(
    colour_run: Path, tmp_path: Path, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message) as caught:
        task_of(colour_run, tmp_path, **sections)

    assert "\n" not in str(caught.value)


def test_a_batch_divides_over_the_ranks(colour_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"optim\.batch_size: 16 is not divisible by the 3 ranks"):
        task_of(colour_run, tmp_path, World(0, 3, torch.device("cpu")))


def dataset(train: list[int] | None, test: list[int] | None, classes: int | None = 2) -> Dataset:
    def source(labels: list[int] | None, name: str) -> TensorSource:
        count = 20 if labels is None else len(labels)
        stack = torch.zeros(count, 3, 8, 8, dtype=torch.uint8)
        keys = [f"{name}/{number}" for number in range(count)]
        return TensorSource(keys, stack, None if labels is None else torch.tensor(labels))

    return Dataset(source(train, "train"), classes, (0.5,) * 3, (0.5,) * 3, lambda: source(test, "test"))


@pytest.mark.parametrize(
    ("opened", "message"),
    [
        (dataset(None, None, None), r"has no labels; give images with labels"),
        (dataset([0, 1] * 10, None), r"the test images of .* have no labels"),
        (dataset([0, 1] * 10, [0, 2]), r"label 2 among the test images .* the classes 0 to 1"),
        (dataset([0, 1] * 10, [0, -1]), r"label -1 among the test images"),
    ],
)
def test_labels_have_to_be_there(
    colour_run: Path, monkeypatch: pytest.MonkeyPatch, opened: Dataset, message: str
) -> None:
    monkeypatch.setattr(images_module, "open_dataset", lambda *_: opened)
    data = ImagesConfig(dataset="folder", path="pictures")

    with pytest.raises(UserError, match=message):
        LabelledImages(data, read_pretrained(colour_run), FaultLedger(0.1)).test((8, 8))


def test_unlabelled_images_are_left_out(colour_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "open_dataset", lambda *_: dataset([0, 1, -1] * 10, [0, 1]))
    data = ImagesConfig(dataset="folder", path="pictures")

    images = LabelledImages(data, read_pretrained(colour_run), FaultLedger(0.1)).train((8, 8))

    assert images.indices.tolist() == [number for number in range(30) if number % 3 != 2]


def test_classes_are_called_by_their_folders(colour_run: Path, digits_run: Path, tmp_path: Path) -> None:
    digits = task_of(digits_run, tmp_path)

    assert task_of(colour_run, tmp_path)._images.class_names() == ("blue", "green", "red")
    assert digits._images.class_names() == tuple("0123456789")


def test_the_picture_marks_what_is_wrong(tmp_path: Path) -> None:
    image = torch.full((3, 8, 8), 128, dtype=torch.uint8)

    def red(truth: int) -> int:
        class_picture(tmp_path / "p.png", [Guess(image, 0, truth, 0.7)], ["a", "b"], "title")
        with Image.open(tmp_path / "p.png") as picture:
            pixels = list(picture.convert("RGB").get_flattened_data())
        return sum(1 for r, g, b in pixels if r > 180 and g < 60 and b < 60)

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
