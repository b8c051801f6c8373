"""``mlomae visualize CKPT IMAGE…``: what a trained mask does to images of one's own, as a PNG."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mlomae.arguments import EXIT_OK, Parser
from mlomae.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from mlomae.preview import Preview
    from mlomae.trainer import Trainer

MAX_IMAGES = 32


def main(words: Sequence[str]) -> int:
    """Draws and says where; returns the exit code.

    Raises:
        UserError: bad input.
    """
    known = _parser().parse_args(words)
    if len(known.images) > MAX_IMAGES:
        raise UserError(f"IMAGE: {len(known.images)} of them do not fit on a page; give {MAX_IMAGES} at most")
    if not known.out.parent.is_dir():
        raise UserError(f"--out {known.out}: {known.out.parent} is not a folder")
    draw(known.checkpoint, known.images, known.out, {n: v for n, v in vars(known).items() if "." in n and v})
    print(known.out)
    return EXIT_OK


def draw(path: Path, files: Sequence[Path], out: Path, fields: dict[str, str]) -> None:
    """Writes a PNG with a row per image: input, removal probability, influence, masked, reconstruction.

    The influence needs the run's own images too: a training batch and a held-out batch tell the direction in
    which weights would help the task. Without a hypergradient there is none.

    Args:
        path: run directory (its newest checkpoint), or one of its checkpoints.
        fields: of the run's configuration that are others now: ``data.path``, ``data.test_path``.

    Raises:
        UserError: it is no run, its data is missing, or an image cannot be read.
    """
    # Imported late: --help and misuse answer at once.
    from mlomae.config import load_run
    from mlomae.distributed.env import join_world
    from mlomae.interop.encoder import load_encoder
    from mlomae.interop.runs import run_of
    from mlomae.run_dir import RunDir
    from mlomae.trainer import Trainer
    from mlomae.visualize import mask_picture

    run = run_of(path)
    if run is None:
        raise UserError(f"{path}: is neither a run directory nor a checkpoint of one, such as runs/x")
    config = load_run(run, fields)
    images = load_encoder(path).preprocess(files)
    # Nothing is written into the run, which may be training now.
    trainer = Trainer(config, RunDir(run, config), join_world(config.device), None)
    try:
        if trainer.resume(None if path == run else path) is None:
            raise UserError(f"{run}: has no checkpoint yet; wait for the run's first one")
        shown = _preview(trainer, images)
        influence = _influence(trainer, images, shown.mask)
    finally:
        trainer.loaders.close()
    title = f"{config.masking.policy} mask of {run.resolve().name}, iteration {trainer.iteration}"
    mask_picture(out, shown, title, influence=influence)


def _preview(trainer: Trainer, images: Tensor) -> Preview:
    import torch

    from mlomae.compilation import eagerly
    from mlomae.preview import preview

    levels, loaders, device = trainer.levels, trainer.loaders, trainer.world.device
    network = None if levels.scorer is None else levels.scorer.engine.module
    mean, std = (torch.tensor(value, device=device)[:, None, None] for value in (loaders.mean, loaders.std))
    pretrain = levels.pretrain
    with eagerly():
        return preview(pretrain.autoencoder, network, pretrain.policy, images.to(device), mean, std)


def _influence(trainer: Trainer, images: Tensor, mask: Tensor) -> Tensor | None:
    """Derivative of each patch's error [N, L] along the direction that the run's next batches give."""
    from mlomae.hypergradient import MaskedBatch

    levels, device = trainer.levels, trainer.world.device
    if levels.mask is None or levels.head is None:
        return None
    hypergradient = levels.mask.hypergradient
    batches = levels.head.next_batch(), levels.mask.next_batch()
    direction = hypergradient.direction(*batches, trainer.iteration)
    selection = levels.pretrain.policy.keep_lowest(mask.to(device))  # 0 is kept, 1 removed
    return hypergradient.influence(MaskedBatch(images.to(device), selection, None, None), direction)[0]


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="mlomae visualize",
        description="Shows what a trained mask does to images of your own: where it would remove patches, "
        "which of them matter to the task, and what the autoencoder fills in.",
        examples=(
            "mlomae visualize runs/cifar10 frog.png ship.png",
            "mlomae visualize runs/x/checkpoints/step-00000200 photos/*.jpg --out before.png",
        ),
    )
    parser.add_argument(
        "checkpoint", type=Path, metavar="CKPT", help="run directory, or one of its checkpoints"
    )
    parser.add_argument(
        "images", type=Path, nargs="+", metavar="IMAGE", help="JPEG, PNG, WebP, … of any size"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FILE", default=Path("visualize.png"), help="PNG (default: %(default)s)"
    )
    for name in ("data.path", "data.test_path"):
        parser.add_argument(f"--{name}", dest=name, metavar="PATH", help="where the run's images are now")
    return parser
