"""Run directories as training leaves them, made in a moment: a mask learns to find blobs on gradients."""

from __future__ import annotations

import base64
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mlomae.config import dump_config, load_config
from mlomae.tensor_file import write_tensors

Floats = NDArray[np.float32]
NUM_IMAGES, SAMPLE, CLASSES = 8, 200, 6
NAMES = ["airplane", "bird", "cat", "horse", "ship", "truck"]


@dataclass(frozen=True)
class Made:
    """What a run is made of.

    Attributes:
        side: of an image in pixels, a multiple of ``patch``.
        logged: log lines, every ``every`` iterations.
        iterations: of the finished run; ``logged * every`` by default.
        pictured: pictures, evenly spaced; 0 for a run without any.
    """

    policy: str = "learned"
    seed: int = 0
    side: int = 32
    patch: int = 4
    logged: int = 60
    every: int = 20
    iterations: int | None = None
    pictured: int = 12
    finished: bool = True
    labels: bool = True
    gain: float = 0.0

    @property
    def grid(self) -> tuple[int, int]:
        return self.side // self.patch, self.side // self.patch

    @property
    def learns(self) -> bool:
        return self.policy in ("learned", "weighted-random")


def make_run(path: Path, made: Made | None = None) -> Path:
    """Writes the run directory ``path`` and returns it."""
    made = made or Made()
    path.mkdir(parents=True)
    total = made.logged * made.every
    fields = {
        "seed": made.seed,
        "iterations": made.iterations or total,
        "log_every": made.every,
        "model.arch": "vit_micro",
        "model.img_size": made.side,
        "model.patch_size": made.patch,
        "masking.policy": made.policy,
        "data.dataset": "cifar10",
        "data.path": "data/cifar10",
        "pretrain.batch_size": 128,
    }
    config = load_config(None, {name: str(value) for name, value in fields.items()})
    (path / "config.yaml").write_text(dump_config(config))
    rng = np.random.default_rng(made.seed)
    with open(path / "metrics.jsonl", "w") as file:
        for line in range(1, made.logged + 1):
            row = {"step": line * made.every, **_scalars(made, line / made.logged, rng)}
            file.write(json.dumps(row) + "\n")
    environment = {"mlomae": "0.1.0", "python": "3.11.7", "torch": "2.14.1", "device": "a processor"}
    (path / "environment.json").write_text(
        json.dumps({**environment, "world_size": 1, "precision": "float32"})
    )
    if made.finished:
        _write_result(path, made, total)
    if made.pictured:
        _write_pictures(path, made, total, rng)
    return path


def _scalars(made: Made, done: float, rng: np.random.Generator) -> dict[str, Any]:
    def noisy(value: float, share: float = 0.02) -> float:
        return float(value * (1 + share * rng.standard_normal()))

    def falling(start: float, end: float, speed: float = 4.0) -> float:
        return end + (start - end) * math.exp(-speed * done)

    warm = min(1.0, done / 0.05) * 0.5 * (1 + math.cos(math.pi * done))
    row = {
        "loss/pretrain": noisy(falling(1.2, 0.42)),
        "loss/reconstruction": noisy(falling(1.25, 0.48)),
        "mask/agreement": noisy(0.625, 0.001),
        "lr/pretrain": 1.5e-3 * warm,
        "bad_samples": 0,
        "skipped_steps": 0,
        "rewinds": 0,
        "loss_jumps": 0,
        "peak_loss/pretrain": falling(1.4, 0.5),
        "gradient_norm/pretrain": noisy(0.8, 0.1),
        "images_per_second": noisy(180, 0.08),
        "flops_per_second": 3e10,
        "mfu": noisy(0.38, 0.05),
        "data_wait": noisy(0.03, 0.3),
        "memory/peak_bytes": 1.3e9 + 1e8 * min(1.0, 3 * done),
        "mask/frequency": (rng.binomial(128, 0.75, math.prod(made.grid)) / 128).tolist(),
    }
    if made.learns:
        row |= {
            "loss/head": noisy(falling(2.3, 1.6)),
            "gradient_norm/head": noisy(0.3, 0.1),
            "accuracy/head": noisy(0.1 + 0.35 * (1 - math.exp(-4 * done))),
            "loss/mask": noisy(falling(2.3, 1.62)),
            "hypergradient/norm": 10 ** noisy(-5 - 3 * done, 0.03),
            "hypergradient/direction_norm": noisy(0.4 + 3 * done, 0.1),
            "mask/agreement_noiseless": noisy(0.63 + 0.15 * done, 0.005),
            "mask/entropy": noisy(1 - 0.12 * done, 0.001),
            "mask/saturation": max(0.0, noisy(0.06 * done, 0.2)),
            "mask/spread": noisy(0.15 + 0.4 * done, 0.03),
            "lr/head": 1e-2 * warm,
            "lr/mask": 1e-3 * warm,
        }
        if rng.random() < 0.2:
            row["hypergradient/estimated_error"] = noisy(2e-4, 0.3)
    return row


def _write_result(path: Path, made: Made, total: int) -> None:
    score = 0.445 + made.gain + 0.004 * made.seed
    result = {
        "policy": made.policy,
        "seed": made.seed,
        "iterations": made.iterations or total,
        "seconds": 3435.702,
        "images_per_second": 89.41,
        "knn_accuracy": score,
        "linear_accuracy": score + 0.09,
        "bad_samples": 0,
    }
    (path / "result.json").write_text(json.dumps(result))
    about = {
        "task": "finetune",
        "encoder": str(path),
        "num_test": 4000,
        "num_parameters": 459562,
        "epochs": 1,
    }
    lines = [
        {"time": f"2026-11-28T10:3{n}:22+00:00", "out": f"{path}/eval/{out}", "scratch": scratch,
         "accuracy": accuracy, "loss": 1.9 - accuracy, "seconds": 188.4, **about}
        for n, (out, scratch, accuracy) in enumerate(
            [("finetune", False, score + 0.07), ("finetune-scratch", True, 0.39)]
        )
    ]  # fmt: skip
    lines.append({"time": "2026-11-28T10:40:00+00:00", "out": f"{path}/eval/segment", "task": "segment",
                  "scratch": False, "miou": 0.32, "pixel_accuracy": 0.73, "iou/sky": 0.9, "iou/road": 0.85,
                  "iou/sign": None, "num_test": 101})  # fmt: skip
    (path / "evaluations.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def _write_pictures(path: Path, made: Made, total: int, rng: np.random.Generator) -> None:
    centres, labels = _objects(rng, SAMPLE)
    wanted = np.stack([_near(centre, made) for centre in centres])
    start = 0.12 * rng.standard_normal(wanted.shape)
    with open(path / "pictures.jsonl", "w") as file:
        for number in range(1, made.pictured + 1):
            done = number / made.pictured
            scores = (1 - done) * start + done * wanted if made.learns else start
            probability = 1 / (1 + np.exp(-scores)) if made.learns else np.full_like(scores, 0.75)
            removed = _lowest_kept(scores)
            line = {
                "step": round(done * total),
                "grid": list(made.grid),
                "images": NUM_IMAGES,
                "probability": _base64((255 * probability[:NUM_IMAGES]).round().astype(np.uint8)),
                "removed": _base64(np.packbits(removed[:NUM_IMAGES])),
            }
            file.write(json.dumps(line) + "\n")
    pictured = np.stack([_image(centre, label, made) for centre, label in zip(centres, labels, strict=True)])
    shown = pictured[:NUM_IMAGES]
    tensors = {
        "images": shown,
        "reconstruction": _blurred(shown, made.patch),
        "probability": probability[:NUM_IMAGES].astype(np.float16),
        "removed": removed[:NUM_IMAGES],
        "frequency": removed.mean(axis=0, dtype=np.float32),
    }
    state: dict[str, Any] = {
        "step": total,
        "grid": list(made.grid),
        "influence_step": None,
        "class_names": None,
    }
    if made.labels:
        tensors["class_frequency"] = np.stack(
            [removed[labels == label].mean(axis=0, dtype=np.float32) for label in range(CLASSES)]
        )
        tensors["class_count"] = np.bincount(labels, minlength=CLASSES)
        state["class_names"] = NAMES
    if made.learns:
        gone = rng.random((NUM_IMAGES, math.prod(made.grid))) < 0.75
        values = wanted[NUM_IMAGES : 2 * NUM_IMAGES] + 0.4 * rng.standard_normal(gone.shape)
        tensors["influence"] = (1e-3 * values).astype(np.float32)
        tensors["influence_removed"] = gone.astype(np.uint8)
        tensors["influence_images"] = pictured[NUM_IMAGES : 2 * NUM_IMAGES]
        state["influence_step"] = total - 4
    found = {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in tensors.items()}
    write_tensors(path / "pictures.safetensors", found, state)


def _objects(rng: np.random.Generator, count: int) -> tuple[Floats, NDArray[np.int64]]:
    """Centres in [0, 1] and classes; each class has its own favourite place."""
    labels = np.arange(count) % CLASSES
    angle = 2 * np.pi * labels / CLASSES
    favourite = 0.5 + 0.25 * np.stack([np.sin(angle), np.cos(angle)], axis=1)
    centres = (favourite + 0.06 * rng.standard_normal((count, 2))).clip(0.1, 0.9)
    return centres.astype(np.float32), labels


def _near(centre: Floats, made: Made) -> Floats:
    """[L] scores, high near the object."""
    rows, columns = ((np.arange(size) + 0.5) / size for size in made.grid)
    distance = np.hypot(rows[:, None] - centre[0], columns[None, :] - centre[1])
    near: Floats = (1.6 * np.exp(-((distance / 0.25) ** 2)) - 0.6).ravel().astype(np.float32)
    return near


def _image(centre: Floats, label: int, made: Made) -> NDArray[np.uint8]:
    """[C, H, W]: a coloured blob on a gradient."""
    at = (np.arange(made.side) + 0.5) / made.side
    inside = np.exp(-((np.hypot(at[:, None] - centre[0], at[None, :] - centre[1]) / 0.18) ** 4))
    color = np.array(
        [[220, 80, 60], [240, 200, 90], [90, 170, 90], [150, 90, 60], [60, 90, 160], [120, 120, 130]]
    )
    ground = np.stack(
        [150 + 60 * at[:, None] + 0 * at, 170 + 30 * at[:, None] + 0 * at, 200 - 90 * at[:, None] + 0 * at]
    )
    mixed = ground * (1 - inside) + color[label][:, None, None] * inside
    return mixed.clip(0, 255).astype(np.uint8)


def _blurred(images: NDArray[np.uint8], patch: int) -> NDArray[np.uint8]:
    """Every patch its mean, as a decoder might fill it in."""
    count, channels, height, width = images.shape
    cells = images.reshape(count, channels, height // patch, patch, width // patch, patch).mean(axis=(3, 5))
    return cells.repeat(patch, axis=2).repeat(patch, axis=3).astype(np.uint8)


def _lowest_kept(scores: NDArray[np.floating[Any]], ratio: float = 0.75) -> NDArray[np.uint8]:
    keep = int(scores.shape[1] * (1 - ratio))
    removed = np.ones(scores.shape, np.uint8)
    np.put_along_axis(removed, np.argsort(scores, axis=1)[:, :keep], 0, axis=1)
    return removed


def _base64(values: NDArray[np.uint8]) -> str:
    return base64.b64encode(values.tobytes()).decode()
