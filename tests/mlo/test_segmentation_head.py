"""A head that labels pixels as the teacher: its loss and the hypergradient through it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from mlomae.config import Config
from mlomae.data.batches import Batch
from mlomae.data.scenes import VOID
from mlomae.hypergradient import MaskedBatch
from mlomae.models import encoder as encoder_module
from mlomae.models.encoder import num_pooled
from mlomae.models.head import SegmentationHead
from mlomae.models.mae import MaskedAutoencoder
from mlomae.models.masking import build_masking_network
from mlomae.objectives import head_accuracy, head_loss
from tests.mlo.problem import ITERATION, Named, Problem, _levels_of, detached, flat, relative_error

CLASSES, GRID, SIZE, BATCH = 3, (2, 4), (8, 16), 3
F64 = torch.float64
DAMPING = 1.0
# The finite difference's own error: measured 2e-8.
BOUND = 1e-6
# Measured: 8e-16, and 2e-8 where conjugate gradients stop.
EXACT = {"frozen": 1e-12, "one-step": 1e-12, "implicit": 1e-6}


def _written_out(logits: Tensor, maps: Tensor) -> Tensor:
    """The mean over images of the mean over their pixels that count."""
    means = []
    for image, labels in zip(logits.log_softmax(dim=1), maps, strict=True):
        counted = labels != VOID
        rows = image.permute(1, 2, 0)[counted]
        right = rows.gather(1, labels[counted].long()[:, None])
        means.append(-right.sum() / max(1, int(counted.sum())))
    return torch.stack(means).mean()


def _maps(batch: int = BATCH) -> Tensor:
    maps = torch.randint(CLASSES, (batch, *SIZE)).to(torch.uint8)
    maps[:, :, :5] = VOID
    return maps


def test_head_is_linear_in_the_patches_and_smooth_in_between() -> None:
    head, features = SegmentationHead(6, CLASSES, GRID, SIZE), torch.randn(BATCH, 8, 6)
    logits = head(features)
    assert logits.shape == (BATCH, CLASSES, *SIZE)
    torch.testing.assert_close(head(2 * features), 2 * logits)
    patches = (features @ head.linear.weight.T).transpose(1, 2).reshape(BATCH, CLASSES, *GRID)
    # Patches have 4 x 4 pixels: what lies between four centres is their mean in the middle.
    middle = patches[..., :2, :2].mean(dim=(2, 3))
    torch.testing.assert_close(logits[:, :, 3:5, 3:5].mean(dim=(2, 3)), middle)
    torch.testing.assert_close(logits[:, :, 0, 0], patches[..., 0, 0])  # nothing beyond the outer centres


def test_loss_and_accuracy_are_means_over_images_of_means_over_their_pixels() -> None:
    logits, maps = torch.randn(BATCH, CLASSES, *SIZE), _maps()
    maps[0, :, 6:] = VOID
    torch.testing.assert_close(head_loss(logits, maps), _written_out(logits, maps))
    right = [
        (image.argmax(0)[labels != VOID] == labels[labels != VOID]).float().mean()
        for image, labels in zip(logits, maps, strict=True)
    ]
    torch.testing.assert_close(head_accuracy(logits, maps), torch.stack(right).mean())
    assert head_loss(logits.bfloat16(), maps).dtype == torch.float32


def test_shares_of_a_batch_average_to_its_loss_whatever_counts_in_them() -> None:
    logits, maps = torch.randn(4, CLASSES, *SIZE, requires_grad=True), _maps(4)
    maps[2:] = VOID  # all of the second rank's share
    shares = [head_loss(logits[rows], maps[rows]) for rows in (slice(0, 2), slice(2, 4))]
    torch.testing.assert_close(torch.stack(shares).mean(), head_loss(logits, maps))
    assert shares[1] == 0 and head_accuracy(logits[2:], maps[2:]) == 0
    (gradient,) = torch.autograd.grad(shares[1], logits)
    assert not gradient.any()


def test_class_labels_may_have_the_number_that_is_void_in_maps() -> None:
    logits = torch.randn(4, 300)
    labels = torch.tensor([0, VOID, 1, VOID])
    expected = -logits.log_softmax(dim=1)[torch.arange(4), labels].mean()
    torch.testing.assert_close(head_loss(logits, labels), expected)


class PixelProblem(Problem):
    """The three levels with label maps; the held-out loss is written out, with each answer of the head."""

    def heldout_loss(self, module: MaskedAutoencoder, theta: Named) -> Tensor:
        inside = {n.removeprefix("encoder."): p for n, p in theta.items() if n.startswith("encoder.")}
        head = self.head.engine.module
        start = {name: p.requires_grad_() for name, p in detached(head).items()}

        def loss(batch: Batch, weights: Named) -> Tensor:
            assert batch.labels is not None
            tokens = functional_call(module.encoder, inside, (batch.images,))
            return _written_out(functional_call(head, weights, (tokens[:, 1:],)), batch.labels)

        response = self.head.response
        if response == "frozen":
            return loss(self.heldout, start)
        weights = start
        # One step, or as many as lead to the optimum of the damped problem.
        steps, rate = (1, self.head.lr(ITERATION)) if response == "one-step" else (40, 0.5)
        for _ in range(steps):
            value = loss(self.train, weights)
            if response == "implicit":
                away = sum((weights[name] - start[name]).square().sum() for name in start)
                value = value + DAMPING / 2 * away
            grads = torch.autograd.grad(value, list(weights.values()), create_graph=True)
            weights = {name: w - rate * g for (name, w), g in zip(weights.items(), grads, strict=True)}
        return loss(self.heldout, weights)


def _problem(monkeypatch: pytest.MonkeyPatch, response: str, lr: float = 1.0) -> PixelProblem:
    rates: dict[str, Any] = {"batch_size": BATCH, "warmup": 0.0}
    hypergradient = {"damping": DAMPING, "radius": 1e-6}
    if response != "frozen":
        hypergradient["best_response"] = response
    config = Config.model_validate(
        {
            "levels": 2 if response == "frozen" else 3,
            "model": {
                "arch": "vit_pico", "img_size": SIZE, "patch_size": 4, "pool": "mean",
                "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2,
            },
            "masking": {"ratio": 0.5, "hidden": 8},
            "data": {"dataset": "scenes", "path": "unused", "num_classes": CLASSES},
            "pretrain": {**rates, "lr": 1e-3},
            "head": {**rates, "lr": lr},
            "mask": rates,
            "hypergradient": hypergradient,
        }
    )  # fmt: skip
    monkeypatch.setitem(encoder_module.SIZES, "vit_pico", (16, 2, 2))
    torch.manual_seed(0)
    head = SegmentationHead(num_pooled(16, "mean"), CLASSES, GRID, SIZE)
    torch.nn.init.normal_(head.linear.weight)  # far from undecided, where every class would answer alike
    modules = (MaskedAutoencoder(config.model), head, build_masking_network(config.masking, GRID, 16))
    levels = _levels_of(config, *(module.to(F64) for module in modules))
    images = [torch.randn(BATCH, 3, *SIZE, dtype=F64) for _ in range(3)]
    train, heldout = (Batch(pixels, _maps(), 0, 0) for pixels in images[:2])
    masked: MaskedBatch = levels[0].mask(Batch(images[2], None, 0, 0))
    return PixelProblem(config, *levels, masked, train, heldout)


@pytest.mark.parametrize("response", ["frozen", "one-step", "implicit"])
def test_hypergradient_through_pixels_is_exact(monkeypatch: pytest.MonkeyPatch, response: str) -> None:
    problem = _problem(monkeypatch, response)
    assert problem.head.response == response

    direction = problem.mask.hypergradient.direction(problem.train, problem.heldout, ITERATION)

    expected = problem.exact_direction()
    assert relative_error(flat(direction.values), flat(expected.values())) <= EXACT[response]
    loss = problem.heldout_loss(problem.autoencoder, detached(problem.autoencoder))
    torch.testing.assert_close(direction.heldout_loss, loss.detach())
    assert direction.train_features.shape == (BATCH, 8, 16)
    assert relative_error(problem.hypergradient(), problem.exact) <= BOUND


def test_the_head_of_pixels_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the exactness of the answers would say no more than that of a head that stays."""
    with_answer = [_problem(monkeypatch, response).exact for response in ("one-step", "implicit")]
    without = _problem(monkeypatch, "frozen").exact
    assert all(relative_error(without, exact) > 0.05 for exact in with_answer)


def test_a_step_of_the_head_reads_the_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = _problem(monkeypatch, "one-step", lr=1e-2)
    assert problem.train.labels is not None
    features = problem.mask.hypergradient.features(problem.train.images)
    head = problem.head.engine.module
    expected = _written_out(head(features), problem.train.labels)

    metrics = problem.head.step(features.detach(), problem.train.labels, ITERATION)

    torch.testing.assert_close(metrics["loss/head"], expected.detach())
    assert _written_out(head(features), problem.train.labels) < expected
    assert 0 < metrics["accuracy/head"] < 1
