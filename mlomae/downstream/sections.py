"""What the configurations of all evaluations share; each task adds its own sections in its own module."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field

from mlomae.sections import (
    Display,
    FailureConfig,
    LevelConfig,
    Location,
    Loggers,
    NonNegative,
    Positive,
    Section,
    Share,
)

ImageSize = Positive | tuple[Positive, Positive]

DATA_PATHS = {"data.path", "data.test_path"}
# Fields that may change when an evaluation is resumed: none of them changes what is meant to be computed.
# Whether images elsewhere are the same ones is told by their names.
RESUMABLE_CHANGES = DATA_PATHS | {
    "encoder", "out", "device", "display", "loggers", "log_every", "data.download", "data.max_bad_share",
    "data.workers", "encoder_batch",
}  # fmt: skip
FAILURE = FailureConfig()  # how patient ranks are with each other; of evaluations, nobody asks for more


class OptimConfig(LevelConfig):
    """AdamW, rates that fall from layer to layer, linear warm-up, cosine (He et al. 2022, app. A.2)."""

    epochs: Positive = 100
    batch_size: Positive = Field(1024, description="global batch, summed over ranks")
    lr: NonNegative = Field(
        4e-3, description="highest learning rate, of what is new; MAE's is blr * batch / 256"
    )
    min_lr: NonNegative = Field(1e-6, description="learning rate of the last step")
    warmup: Share = Field(0.05, description="share of the steps spent in linear warm-up")
    betas: tuple[Share, Share] = (0.9, 0.999)
    layer_decay: float = Field(
        0.75, gt=0, le=1, description="factor of the learning rate from each block to the one below it"
    )
    drop_path: float = Field(
        0.1, ge=0, lt=1, description="stochastic depth of the last block, rising linearly"
    )
    ema: float = Field(
        0.0, ge=0, lt=1, description="decay of a moving average of the weights, which is then scored; 0: none"
    )


class TaskConfig(Section):
    """What every evaluation needs to know."""

    encoder: Location = Field("", description="run directory, or file or folder with weights")
    scratch: bool = Field(
        False, description="draw the encoder's weights anew: what training without pretraining reaches"
    )
    fingerprint: str = Field("", description="of the encoder's weights; filled in")
    out: Path | None = Field(
        None, description="folder of the results (default: eval/TASK in the run directory)"
    )
    seed: int = Field(0, ge=0, description="of new weights, batches and augmentation")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "tf32", "float32"] = Field(
        "auto", description="of the passes; weights are float32. auto: bf16 on a GPU, else float32"
    )
    log_every: Positive = Field(10, description="steps between lines of metrics.jsonl")
    display: Display = "auto"
    loggers: Loggers = ("tensorboard",)
    img_size: ImageSize | None = Field(
        None, description="side, or [height, width]; positions are interpolated. None: as pretrained"
    )

    @property
    def size(self) -> tuple[int, int] | None:
        """(height, width) in pixels; None for that of pretraining."""
        if self.img_size is None:
            return None
        return (self.img_size,) * 2 if isinstance(self.img_size, int) else self.img_size


class TrainedTaskConfig(TaskConfig):
    """What every evaluation that trains the encoder needs to know."""

    checkpoint_every: Positive = Field(1, description="epochs between checkpoints")
    optim: OptimConfig = OptimConfig()
