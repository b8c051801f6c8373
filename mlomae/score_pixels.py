"""How good is the head that labels pixels? Its figures on the test set, from one confusion matrix."""

from __future__ import annotations

import torch

from mlomae.compilation import eagerly
from mlomae.data.loader import LevelLoaders
from mlomae.distributed.env import World
from mlomae.downstream.confusion import Confusion
from mlomae.errors import UserError
from mlomae.levels import HeadLevel
from mlomae.models.encoder import ViTEncoder
from mlomae.ranges import position, profiled


@torch.no_grad()
def score_pixels(
    encoder: ViTEncoder, level: HeadLevel | None, loaders: LevelLoaders, world: World
) -> dict[str, float]:
    """Scores the head level: a linear probe of the patch tokens that was trained along.

    Images and label maps are brought to the model's size. Called on every rank; each computes its share of
    the batches, all return the same.

    Args:
        level: None without a hypergradient.

    Returns:
        ``head_miou`` and ``head_pixel_accuracy`` in [0, 1]; nothing without a head.

    Raises:
        UserError: no test image can be used.
    """
    if level is None:
        return {}
    assert loaders.num_classes is not None
    head, confusion = level.engine.whole_module(), Confusion(loaders.num_classes, world.device)
    with profiled("evaluate/pixels"), eagerly():
        for batch in loaders.evaluation("test"):
            position.number += 1  # on all ranks: whoever computes it, it is progress
            if batch.number % world.size == world.rank:
                assert batch.labels is not None
                logits = head(encoder(batch.images.to(world.device))[:, 1:])
                confusion.add(logits.argmax(1), batch.labels.to(world.device))
    confusion.reduce()
    if not confusion.counts.any():
        raise UserError("data.path: no image of the test set can be used; see bad_samples.jsonl")
    figures = confusion.figures([str(number) for number in range(loaders.num_classes)])
    return {"head_miou": figures["miou"], "head_pixel_accuracy": figures["pixel_accuracy"]}
