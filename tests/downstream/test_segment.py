"""``mlomae eval segment``: it learns, scores at the size of the maps, and refuses what does not suit."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from mlomae.cli import main
from mlomae.config import load_tree
from mlomae.data.dataset import STATISTICS
from mlomae.distributed.env import World, join_world, leave_world
from mlomae.downstream.scene_picture import Scene, class_colours, scene_picture
from mlomae.downstream.segment import Config, Segmentation, run
from mlomae.errors import UserError
from mlomae.interop.pretrained import Pretrained
from mlomae.models.encoder import SIZES
from mlomae.preemption import Preemption
from mlomae.run_dir import RunDir
from tests.data.made_squares import COLOURS, NAMES, VOID, encode_png, write_squares
from tests.distributed.ranks import run_ranks

ALONE = World(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training scenes of 32 x 32 pixels and 7 of 32 x 48 for testing."""
    root = tmp_path_factory.mktemp("squares")
    write_squares(root, "training", 40)
    write_squares(root, "validation", 7, first_seed=100, size=(32, 48))
    return root


def pretrained() -> Pretrained:
    """A ViT as it is drawn, with patches of 4 pixels."""
    width, depth, heads = SIZES["vit_pico"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        vit = VisionTransformer(
            img_size=32, patch_size=4, embed_dim=width, depth=depth, num_heads=heads, num_classes=0
        )
    return Pretrained(
        "vit_pico", (32, 32), 4, 3, "mean", *STATISTICS["RGB"], vit.state_dict(), Path("encoder.safetensors")
    )


def config(root: Path, **fields: Any) -> Config:
    tree = {
        "encoder": "somewhere",
        "data.path": str(root),
        "data.num_classes": 3,
        "data.names": list(NAMES),
        "head.channels": 16,
        "augment.scale": [0.75, 1.5],
        "augment.colour": 0.1,
        "optim.epochs": 1,
        "optim.batch_size": 8,
        "optim.lr": 4e-3,
        "device": "cpu",
        **{name.replace("__", "."): value for name, value in fields.items()},
    }
    return load_tree(None, {name: json.dumps(value) for name, value in tree.items()}, Config)


def train(root: Path, out: Path, **fields: Any) -> dict[str, Any]:
    settings = config(root, **fields)
    run_dir = RunDir(out, settings)
    run_dir.claim(primary=True)
    with Preemption() as preemption:
        return run(settings, pretrained(), run_dir, ALONE, preemption)


def task_of(root: Path, out: Path, world: World = ALONE, **fields: Any) -> Segmentation:
    settings = config(root, **fields)
    return Segmentation(settings, pretrained(), RunDir(out, settings), world)


class ByColour(nn.Module):
    """Scores that are the nearer to 0 the nearer a pixel is to the class's colour."""

    def forward(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(values)[:, None, None] for values in STATISTICS["RGB"])
        shown = (images * std + mean) * 255
        colours = torch.from_numpy(COLOURS).float()[None, :, :, None, None]
        return -(shown[:, None] - colours).square().sum(dim=2)


def test_it_learns_which_squares_are_green(squares: Path, tmp_path: Path) -> None:
    result = train(squares, tmp_path / "out", optim__epochs=6)

    assert result["miou"] > 0.8
    assert result["pixel_accuracy"] > 0.9
    assert result["num_test"] == 7
    assert set(result) >= {f"iou/{name}" for name in NAMES} | {"mean_class_accuracy"}
    with Image.open(tmp_path / "out" / "predictions.png") as picture:
        assert picture.width > 600


def test_figures_are_taken_at_the_size_of_the_maps(squares: Path, tmp_path: Path) -> None:
    """Against the colours themselves: each test image is three windows side by side, resized to half."""
    task = task_of(squares, tmp_path, img_size=16)
    figures = task.evaluate(ByColour())

    hits = total = 0
    for number in range(7):
        image, labels = task._test.scene(number, 3)
        assert labels.shape == (32, 48)
        difference = image.float()[None] - torch.from_numpy(COLOURS).float()[:, :, None, None]
        nearest = difference.square().sum(dim=1).argmin(dim=0)
        hits += int(((nearest == labels) & (labels != VOID)).sum())
        total += int((labels != VOID).sum())
    assert hits / total > 0.99, "the colours do not tell the classes"
    # Halving the image blurs the borders of the squares, no more.
    assert 0.9 < figures["pixel_accuracy"] < hits / total
    assert figures["miou"] > 0.8


def test_at_full_size_the_figures_are_those_of_the_pixels(squares: Path, tmp_path: Path) -> None:
    figures = task_of(squares, tmp_path).evaluate(ByColour())
    assert figures["pixel_accuracy"] > 0.99 and figures["miou"] > 0.98


def test_a_bad_test_image_is_left_out_and_named(squares: Path, tmp_path: Path) -> None:
    root = shutil.copytree(squares, tmp_path / "data")
    (root / "images" / "validation" / "s2.png").write_bytes(b"no image")

    figures = task_of(root, tmp_path, data__max_bad_share=0.1).evaluate(ByColour())

    assert figures["num_test"] == 6
    assert "validation/s2.png" in (tmp_path / "bad_samples.jsonl").read_text()
    with pytest.raises(UserError, match="max_bad_share"):
        task_of(root, tmp_path, data__max_bad_share=0.0).evaluate(ByColour())


def test_a_batch_of_void_has_no_loss_and_no_gradient_that_is_not_finite(
    squares: Path, tmp_path: Path
) -> None:
    task = task_of(squares, tmp_path)
    images, labels = next(task.batches(0))
    loss, _ = task.loss(task.model, (images, torch.full_like(labels, VOID)))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in task.model.parameters())
    task.close()


def test_the_loss_is_the_mean_over_the_pixels_that_count(squares: Path, tmp_path: Path) -> None:
    task = task_of(squares, tmp_path)
    images, labels = next(task.batches(0))
    assert (labels == VOID).any()
    loss, _ = task.loss(task.model.eval(), (images, labels))

    log_p = task.model(images).log_softmax(dim=1).permute(0, 2, 3, 1)
    counted = labels != VOID
    expected = -log_p[counted].gather(1, labels[counted][:, None]).mean()
    torch.testing.assert_close(loss, expected)
    task.close()


def test_scratch_draws_other_weights_for_the_encoder_and_the_same_each_time(
    squares: Path, tmp_path: Path
) -> None:
    def weights(scratch: bool) -> Tensor:
        model = task_of(squares, tmp_path, scratch=scratch).model
        return model.get_parameter("encoder.blocks.0.mlp.fc1.weight")

    assert torch.equal(weights(False), pretrained().encoder["blocks.0.mlp.fc1.weight"])
    assert not torch.equal(weights(True), weights(False))
    assert torch.equal(weights(True), weights(True))


def test_the_command_scores_a_run(colour_run: Path, squares: Path, tmp_path: Path) -> None:
    fields: Mapping[str, object] = {
        "data.path": squares, "data.num_classes": 3, "head.channels": 16, "optim.epochs": 1,
        "optim.batch_size": 20, "out": tmp_path / "out", "device": "cpu",
    }  # fmt: skip
    words = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    assert main(["eval", "segment", str(colour_run), *words]) == 0

    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["task"] == "segment" and 0 <= result["miou"] <= 1
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"data__path": None}, "data.path is missing"),
        ({"head__channels": 24}, "head.channels"),
        ({"data__num_classes": None}, "num_classes is missing"),
    ],
)
def test_a_configuration_that_cannot_be_is_refused(squares: Path, fields: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        config(squares, **fields)


@pytest.mark.parametrize(
    ("fields", "world", "message"),
    [
        ({"optim__batch_size": 41}, ALONE, "optim.batch_size: 41 exceeds the 40 training images"),
        ({"optim__batch_size": 9}, World(0, 2, torch.device("cpu")), "not divisible by the 2 ranks"),
        ({"img_size": [32, 30]}, ALONE, "img_size"),
        ({"data__test": "testing"}, ALONE, "testing is not a folder"),
    ],
)
def test_what_does_not_suit_is_refused(
    squares: Path, tmp_path: Path, fields: Any, world: World, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        task_of(squares, tmp_path, world, **fields)


def test_an_unknown_label_in_a_test_map_is_found_before_training(squares: Path, tmp_path: Path) -> None:
    root = shutil.copytree(squares, tmp_path / "data")
    values = np.full((32, 48), 9, np.uint8)
    (root / "annotations" / "validation" / "s6.png").write_bytes(encode_png(values))
    with pytest.raises(UserError, match=r"validation/s6\.png has label 9"):
        task_of(root, tmp_path)


def _evaluate_on_a_rank(root: Path, out: Path) -> dict[str, float]:
    world = join_world("cpu")
    figures = task_of(root, out, world).evaluate(ByColour())
    leave_world()
    return figures


@pytest.mark.dist
def test_two_ranks_find_what_one_finds(squares: Path, tmp_path: Path) -> None:
    alone = task_of(squares, tmp_path).evaluate(ByColour())
    for figures in run_ranks(2, _evaluate_on_a_rank, squares, tmp_path):
        assert figures == alone


def test_the_picture_shows_classes_where_pixels_count(tmp_path: Path) -> None:
    truth = torch.zeros(40, 60, dtype=torch.uint8)
    truth[20:] = 1
    truth[:, 50:] = VOID
    scene = Scene(torch.full((1, 40, 60), 128, dtype=torch.uint8), truth, torch.ones_like(truth))
    scene_picture(tmp_path / "p.png", [scene, scene], ("sky", "road", "absent"), "mIoU 0.5")

    with Image.open(tmp_path / "p.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    shades = [0.65 * colour + 0.35 * 128 for colour in class_colours(3)]
    areas = [int((np.abs(pixels - shade).max(axis=2) <= 1).sum()) for shade in shades]
    # Of a cell: 5/12 are sky in the truth; 5/12 road there and 10/12 in the prediction.
    assert areas[1] / areas[0] == pytest.approx(3, rel=0.1)
    assert areas[2] == 0


@pytest.mark.parametrize("count", [11, 20, 150])
def test_colours_of_classes_differ(count: int) -> None:
    colours = class_colours(count)
    assert colours.shape == (count, 3)
    assert len({tuple(colour) for colour in colours.tolist()}) > 0.9 * count


def test_absent_classes_have_no_iou(squares: Path, tmp_path: Path) -> None:
    settings = {"data__num_classes": 4, "data__names": [*NAMES, "absent"]}
    figures = task_of(squares, tmp_path, **settings).evaluate(ByColour())
    assert math.isnan(figures["iou/absent"]) and figures["miou"] > 0.98
