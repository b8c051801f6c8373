"""Detection from an encoder to figures: it learns, resumes, names what is wrong, and ranks agree."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from pydantic import ValidationError
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.ops import MultiScaleRoIAlign

from mlomae.cli import main
from mlomae.config import load_tree
from mlomae.distributed.env import World, join_world, leave_world
from mlomae.downstream.box_batches import BoxBatch
from mlomae.downstream.detect import Config, DetectTask, frame_of
from mlomae.downstream.fit import Fit
from mlomae.errors import UserError
from mlomae.interop.pretrained import Pretrained
from mlomae.preemption import Preemption
from mlomae.run_dir import RunDir
from tests.data.made_boxes import make_boxes
from tests.distributed.ranks import run_ranks

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "detect"
CPU = World(0, 1, torch.device("cpu"))
BCCD = Path(__file__).resolve().parents[3] / "shared" / "data" / "bccd"
SMALL: dict[str, Any] = {
    "img_size": 64,
    "checkpoint_every": 100,
    "head": {"out_channels": 16, "hidden": 64, "samples": 32, "proposals": 64},
    "augment": {"scale": [0.9, 1.1]},
}
OPTIM = {"batch_size": 4, "lr": 3e-3, "layer_decay": 1.0, "drop_path": 0.0, "warmup": 0.1}


def config_of(root: Path, epochs: int = 1, **fields: Any) -> Config:
    optim = {"epochs": epochs, **OPTIM}
    return Config.model_validate({**SMALL, "data": {"path": str(root)}, "optim": optim, **fields})


def pretrained_of(patch_size: int = 16, in_chans: int = 3) -> Pretrained:
    """vit_pico with weights that are drawn."""
    torch.manual_seed(0)
    vit = VisionTransformer(32, patch_size, in_chans, embed_dim=64, depth=2, num_heads=4, num_classes=0)
    half = (0.5,) * in_chans
    return Pretrained(
        "vit_pico", (32, 32), patch_size, in_chans, "mean", half, half, vit.state_dict(), Path("x")
    )


def task_of(config: Config, folder: Path, world: World = CPU, **encoder: int) -> DetectTask:
    return DetectTask(config, pretrained_of(**encoder), RunDir(folder, config, set()), world)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_boxes(tmp_path_factory.mktemp("boxes") / "set", {"train": 64, "test": 10})


def test_it_learns_to_find_rectangles(root: Path, tmp_path: Path) -> None:
    config = config_of(root, epochs=3)
    run_dir = RunDir(tmp_path / "out", config, set())
    run_dir.claim(primary=True)
    task = task_of(config, tmp_path)
    with Preemption() as preemption:
        figures = Fit(task, config, run_dir, CPU, preemption).run()
    run_dir.release()

    # Before training nothing is found; after 48 steps it was 0.59.
    assert figures["ap50"] > 0.4
    assert figures["num_test"] == 10 and figures["bad_samples"] == 0
    assert {"ap", "ap75", "ap_small", "ap/blue", "ap/red"} <= figures.keys()
    with Image.open(tmp_path / "out" / "predictions.png") as picture:
        assert picture.width > 1000 and picture.height > 600


def test_a_killed_evaluation_takes_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = make_boxes(tmp_path / "set", {"train": 8, "test": 2})
    config = config_of(data, epochs=2, checkpoint_every=1)
    config = config.model_copy(
        update={"optim": config.optim.model_copy(update={"ema": 0.9, "drop_path": 0.5})}
    )

    def run(name: str, last: int) -> Path:
        """Fits in a folder of this name; dies before step ``last``."""
        folder, loss = tmp_path / name, DetectTask.loss
        run_dir = RunDir(folder, config, set())
        run_dir.claim(primary=True)

        def dying(task: DetectTask, model: nn.Module, batch: BoxBatch) -> Any:
            if batch.number == last:
                raise KeyboardInterrupt
            return loss(task, model, batch)

        with monkeypatch.context() as patch, Preemption() as preemption, suppress(KeyboardInterrupt):
            patch.setattr(DetectTask, "loss", dying)
            Fit(task_of(config, tmp_path), config, run_dir, CPU, preemption).run()
        run_dir.release()
        return folder / "model.safetensors"

    undisturbed = load_file(run("whole", last=99))
    assert not run("parts", last=3).exists()
    resumed = load_file(run("parts", last=99))

    assert all(torch.equal(undisturbed[name], resumed[name]) for name in undisturbed)


def test_what_is_found_does_not_depend_on_what_was_seen_before(root: Path, tmp_path: Path) -> None:
    task = task_of(config_of(root), tmp_path)
    model, fresh = task.model.eval(), copy.deepcopy(task.model).eval()
    image = torch.rand(3, 64, 48)
    with torch.no_grad():
        model([torch.rand(3, 13, 10)])  # far smaller than the frame
        (found,), (expected,) = model([image]), fresh([image])
        features = model.backbone(image.new_zeros(1, 3, 64, 64))
        boxes = [torch.tensor([[8.0, 8.0, 40.0, 40.0]])]
        pooled = model.roi_heads.box_roi_pool(features, boxes, [(13, 10)])
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    aligned = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)(features, boxes, [(64, 64)])
    assert torch.equal(pooled, aligned)


def test_nothing_is_found_before_training(root: Path, tmp_path: Path) -> None:
    task = task_of(config_of(root), tmp_path)
    with torch.no_grad():
        figures = task.evaluate(task.model.eval())
    assert figures["ap50"] < 0.05


def test_from_the_command_line(root: Path, colour_run: Path, tmp_path: Path) -> None:
    data = make_boxes(tmp_path / "few", {"train": 4, "val": 3})
    fields = {
        "data.path": data, "data.test": "val", "img_size": 64, "optim.epochs": 1, "optim.batch_size": 2,
        "head.out_channels": 8, "head.hidden": 16, "head.samples": 16, "head.proposals": 16, "scratch": True,
    }  # fmt: skip
    flags = [word for name, value in fields.items() for word in (f"--{name}", str(value))]
    out = tmp_path / "out"

    assert main(["eval", "detect", str(colour_run), *flags, "--out", str(out)]) == 0

    result = json.loads((out / "result.json").read_text())
    assert (result["task"], result["scratch"], result["num_test"]) == ("detect", True, 3)
    assert 0 <= result["ap"] <= 1 and result["ap_large"] is None
    assert (out / "predictions.png").exists() and (out / "model.safetensors").exists()


def test_weights_depend_on_the_seed_and_the_encoder_only(root: Path, tmp_path: Path) -> None:
    def weights(**fields: Any) -> dict[str, Tensor]:
        return dict(task_of(config_of(root, **fields), tmp_path).model.state_dict())

    torch.rand(5)
    one, again, other, scratch = weights(), weights(), weights(seed=1), weights(scratch=True)
    new, block = "roi_heads.box_head.fc6.weight", "backbone.encoder.blocks.0.attn.qkv.weight"
    given = pretrained_of().encoder["blocks.0.attn.qkv.weight"]

    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one[new], other[new])
    assert torch.equal(one[block], given) and torch.equal(other[block], given)
    assert not torch.equal(scratch[block], given)


def test_every_parameter_gets_a_gradient_even_without_boxes(root: Path, tmp_path: Path) -> None:
    # DistributedDataParallel waits for all of them.
    task = task_of(config_of(root), tmp_path)
    batch = next(task.batches(0))
    empty = replace(batch, boxes=torch.empty(0, 4), classes=batch.classes[:0], counts=(0,) * 4)
    loss, scalars = task.loss(task.model, empty)
    loss.backward()
    task.close()

    assert [name for name, value in task.model.named_parameters() if value.grad is None] == []
    parts = {"classifier", "box_reg", "objectness", "rpn_box_reg"}
    assert scalars.keys() == {f"loss/{name}" for name in parts}
    torch.testing.assert_close(torch.stack([*scalars.values()]).sum(), loss.detach())


def test_what_is_found_depends_on_no_other_image(root: Path, tmp_path: Path) -> None:
    task = task_of(config_of(root), tmp_path)
    model = task.model.eval()
    generator = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=generator) for size in ((64, 40), (30, 64), (64, 64))]
    with torch.no_grad():
        together = model(images)
        for image, expected in zip(images, together, strict=True):
            torch.testing.assert_close(model([image])[0]["boxes"], expected["boxes"], rtol=1e-4, atol=1e-3)
            # Nothing outside of the image itself.
            assert (expected["boxes"][:, 2] <= image.shape[2]).all()
            assert (expected["boxes"][:, 3] <= image.shape[1]).all()


def test_boxes_stay_float32_under_autocast(root: Path, tmp_path: Path) -> None:
    task = task_of(config_of(root), tmp_path)
    batch = next(task.batches(0))
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = task.loss(task.model, batch)
        with torch.no_grad():
            maps = task.model.backbone(torch.rand(1, 3, 64, 64))
            found = task.model.eval()(batch.images())
    task.close()

    assert loss.dtype == torch.float32 and loss.isfinite()
    assert {value.dtype for value in maps.values()} == {torch.float32}
    assert [value.shape[2:] for value in maps.values()] == [(16, 16), (8, 8), (4, 4), (2, 2), (1, 1)]
    boxes = torch.cat([entry["boxes"] for entry in found])
    assert boxes.dtype == torch.float32
    assert not torch.equal(boxes, boxes.bfloat16().float())


def evaluate(root: Path, folder: Path) -> dict[str, float]:
    """On as many ranks as there are; the threshold is lowered, so that an untrained model finds something."""
    world = join_world("cpu")
    task = task_of(config_of(root), folder, world)
    task.model.roi_heads.score_thresh = 0.0
    with torch.no_grad():
        figures = task.evaluate(task.model.eval())
    leave_world()
    return figures


@pytest.mark.dist
def test_ranks_share_the_test_images(root: Path, tmp_path: Path) -> None:
    alone = evaluate(root, tmp_path)
    first, second = run_ranks(2, evaluate, root, tmp_path)

    assert second == {}
    assert alone["ap50"] > 0
    assert first == pytest.approx(alone, rel=1e-3, nan_ok=True)


def test_bad_images_are_counted_and_named(tmp_path: Path) -> None:
    data = make_boxes(tmp_path / "set", {"train": 8, "test": 4})
    (data / "test" / "002.png").write_bytes(b"poison")
    config = config_of(data, data={"path": str(data), "max_bad_share": 0.1})
    task = task_of(config, tmp_path)
    with torch.no_grad():
        figures = task.evaluate(task.model.eval())

    assert (figures["num_test"], figures["bad_samples"]) == (3, 1)
    (line,) = (tmp_path / "bad_samples.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "002.png"
    with torch.no_grad(), pytest.raises(UserError, match=r"data\.max_bad_share: 1 of 12 samples are bad"):
        task_of(config_of(data), tmp_path).evaluate(task.model)


def test_without_a_usable_test_image_there_is_no_figure(tmp_path: Path) -> None:
    data = make_boxes(tmp_path / "set", {"train": 8, "test": 2})
    for name in ("000.png", "001.png"):
        (data / "test" / name).write_bytes(b"poison")
    task = task_of(config_of(data, data={"path": str(data), "max_bad_share": 1.0}), tmp_path)
    with torch.no_grad(), pytest.raises(UserError, match="no image of the test set can be used"):
        task.evaluate(task.model.eval())


@pytest.mark.parametrize(
    ("fields", "encoder", "message"),
    [
        ({"optim": {"batch_size": 65}}, {}, "optim.batch_size: 65 exceeds the 64 training images"),
        ({}, {"patch_size": 2}, "encoder: its patch size is 2; detection needs a power of two, 4 or more"),
        ({}, {"in_chans": 2}, "encoder: 2 channels do not suit image files"),
    ],
)
def test_refused(
    fields: dict[str, Any], encoder: dict[str, int], message: str, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        task_of(config_of(root).model_copy(update=parsed(fields)), tmp_path, **encoder)


def parsed(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: getattr(Config.model_validate(fields), name) for name in fields}


def test_ranks_have_to_divide_the_batch(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"optim\.batch_size: 4 is not divisible by the 3 ranks"):
        task_of(config_of(root), tmp_path, World(0, 3, torch.device("cpu")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"encoder": "runs/x"}, "data.path is missing"),
        ({"data": {"path": "x", "test": "train"}}, "data.test is 'train', as data.train is"),
        ({"augment": {"scale": [0.5, 0.2]}}, r"scale is \[0.5, 0.2\]; expected two positive numbers"),
    ],
)
def test_configurations_that_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Config.model_validate(fields)
    assert Config().data.path is None  # which other checks rely on


@pytest.mark.parametrize(
    ("size", "patch", "frame"),
    [
        ((64, 64), 16, (64, 64)),
        ((96, 128), 8, (96, 128)),
        ((100, 1), 8, (128, 32)),
        ((1024, 1), 16, (1024, 64)),
    ],
)
def test_frames_are_whole_multiples_of_four_patches(
    size: tuple[int, int], patch: int, frame: tuple[int, int]
) -> None:
    assert frame_of(size, patch) == frame


def test_recipes_can_be_read() -> None:
    for path in sorted(RECIPES.glob("*.yaml")):
        config = load_tree(path, {"encoder": "x"}, Config)
        assert config.data.path is not None, path


def test_blood_cells(tmp_path: Path) -> None:
    if not BCCD.is_dir():
        pytest.skip(f"needs the BCCD photographs in {BCCD}")
    task = task_of(config_of(BCCD, img_size=[96, 128]), tmp_path, patch_size=8)
    batch = next(task.batches(0))
    loss, _ = task.loss(task.model, batch)
    task.close()

    assert task.steps_per_epoch == 51
    assert batch.pixels.shape == (4, 3, 96, 128) and max(batch.counts) > 5
    assert loss.isfinite()
