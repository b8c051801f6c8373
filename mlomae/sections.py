"""The sections of a run's configuration, each with the checks that need no other section."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]

Location = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, Path) else value)]

Arch = Literal["vit_pico", "vit_micro", "vit_tiny", "vit_small", "vit_base", "vit_large", "vit_huge"]
Policy = Literal["learned", "random", "fixed", "weighted-random", "block", "hard"]
# Policies with a hypergradient, with a masking network, and whose scores say what is removed.
LEARNING: tuple[Policy, ...] = ("learned", "weighted-random")
SCORED: tuple[Policy, ...] = (*LEARNING, "hard")
SELECTING: tuple[Policy, ...] = ("learned", "hard")

Display = Annotated[
    Literal["auto", "quiet", "json"],
    Field(description="auto: a view on a terminal, else lines; quiet: nothing; json: an object a line"),
]
LoggerName = Literal["tensorboard", "wandb", "mlflow"]
Loggers = Annotated[
    tuple[LoggerName, ...],
    BeforeValidator(lambda value: value.replace(" ", "").split(",") if isinstance(value, str) else value),
    Field(description="tensorboard, wandb, mlflow: where scalars, images and the configuration go too"),
]


class Section(BaseModel):
    """Base of every section: immutable, unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_booleans_as_numbers(cls, values: Any) -> Any:
        """Python counts true as 1, so that ``lr: yes`` would pass for a learning rate."""
        for name, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(name)
            if isinstance(value, bool) and field is not None and field.annotation is not bool:
                raise ValueError(f"{name} is a truth value, found {value}; expected another type")
        return values


class ModelConfig(Section):
    """Encoder and decoder of the masked autoencoder."""

    arch: Arch = "vit_base"
    weights: Location | None = Field(
        None, description="to start from: a run, or weights of timm, MAE or Hugging Face (docs/interop.md)"
    )
    img_size: Positive | tuple[Positive, Positive] = Field(224, description="side, or [height, width]")
    patch_size: Positive = Field(16, description="side of a patch; divides both sides of the image")
    in_chans: Positive = Field(3, description="3 for RGB, 1 for greyscale")
    decoder_dim: Positive = 512
    decoder_depth: Positive = 8
    decoder_heads: Positive = 16
    norm_pix: bool = Field(True, description="normalise each target patch (MAE)")
    pool: Literal["cls", "mean", "cls+mean"] = Field(
        "cls", description="cls | mean | cls+mean: features for the head and for evaluation"
    )
    predict: Literal["removed", "all"] = Field(
        "removed",
        description="patches that the decoder's last layers compute in training; all changes no loss",
    )
    attention: Literal["auto", "flash", "fused", "reference"] = Field(
        "auto",
        description="flash: the flash-attn package (bf16 on a GPU); fused: torch's; "
        "reference: plain PyTorch; auto: flash where it can be had, else fused",
    )

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return (self.img_size,) * 2 if isinstance(self.img_size, int) else self.img_size

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        height, width = self.size
        return height // self.patch_size, width // self.patch_size

    @property
    def num_patches(self) -> int:
        rows, columns = self.grid
        return rows * columns

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if any(side % self.patch_size for side in self.size):
            raise ValueError(
                f"img_size {self.size} is not divisible by patch_size {self.patch_size}; "
                "choose a patch size that divides both sides"
            )
        if self.norm_pix and self.patch_size**2 * self.in_chans < 2:
            raise ValueError(
                "norm_pix needs patches of two numbers or more; set it to false for single pixels"
            )
        if self.decoder_dim % self.decoder_heads:
            raise ValueError(
                f"decoder_dim {self.decoder_dim} is not divisible by decoder_heads {self.decoder_heads}"
            )
        if self.decoder_dim % 4:
            raise ValueError(f"decoder_dim {self.decoder_dim} is not a multiple of 4 (sin-cos positions)")
        return self


class MaskingConfig(Section):
    """How patches are chosen for removal, and with which weights they are scored."""

    policy: Policy = Field(
        "learned",
        description="learned | random (plain MAE) | fixed (one position mask for all images) | "
        "weighted-random (random selection, learned weights) | block (contiguous blocks) | "
        "hard (what reconstructs worst, found without labels)",
    )
    ratio: float = Field(0.75, gt=0, lt=1, description="share of patches removed")
    network: Literal["token", "mlp"] = Field(
        "token", description="token: small shared convolutional head; mlp: flattened tokens (paper)"
    )
    hidden: Positive = Field(64, description="hidden width of the masking network (paper's mlp: 512)")
    logit_bound: float = Field(1.0, gt=0, description="scores stay within plus/minus this bound")
    selection: Literal["gumbel", "topk"] = Field(
        "gumbel", description="gumbel: perturbed top-k; topk: lowest scores kept (paper)"
    )
    temperature: float = Field(1.0, gt=0, description="scale of the Gumbel noise on the scores")
    random_share: Share = Field(0.5, description="share of images in a batch that get a random mask")
    hard_share: Share = Field(
        0.5, description="of hard: share of the removed patches that are the hardest at the end; 0 at first"
    )

    @model_validator(mode="after")
    def _check(self) -> MaskingConfig:
        if self.network == "token" and self.hidden % 4:
            raise ValueError(f"hidden {self.hidden} is not a multiple of 4 (sin-cos positions)")
        return self

    @property
    def learns(self) -> bool:
        """Whether a hypergradient trains the masking network, which takes the head and mask levels."""
        return self.policy in LEARNING

    @property
    def scored(self) -> bool:
        """Whether there is a masking network."""
        return self.policy in SCORED

    @property
    def selects_by_score(self) -> bool:
        """Whether the scores say what is removed, apart from noise."""
        return self.policy in SELECTING


class ImagesConfig(Section):
    """Where labelled images come from, and how disjoint sets are made of them."""

    reads_label_maps: ClassVar[bool] = False

    dataset: Literal[
        "digits",
        "cifar10",
        "cifar100",
        "folder",
        "shards",
        "csv",
        "medmnist",
        "cub200",
        "cars",
        "inat2019",
        "scenes",
    ] = Field(
        "digits",
        description="csv: path is a table of image files; medmnist: path is an .npz file; cub200, cars, "
        "inat2019: path is the folder of the set as it was published; scenes: path holds images/ and "
        "annotations/, a label map for each image (ADE20K)",
    )
    path: Location | None = Field(
        None,
        description="of the data set: folder, file, or pattern of shards such as "
        "https://…/train-{0000..0099}.tar (not needed for digits)",
    )
    test_path: Location | None = Field(None, description="pattern of the test shards, where path is one")
    download: bool = Field(False, description="let torchvision download cifar10/cifar100 into path")
    heldout_fraction: float = Field(0.2, gt=0, lt=1, description="share of training images for level mask")
    test_fraction: float = Field(
        0.2, gt=0, lt=1, description="share split off for testing where the data set has no test part"
    )
    split_seed: int = Field(0, ge=0, description="seed of the train / held-out / test split")
    max_bad_share: Share = Field(0.01, description="of the samples that may be bad; they are passed over")
    workers: int = Field(0, ge=0, description="loader processes per level; 0 loads in the main process")

    @model_validator(mode="after")
    def _check_location(self) -> Self:
        if self.dataset != "digits" and self.path is None:
            raise ValueError(
                f"path is missing; dataset {self.dataset!r} needs the folder or file that holds it"
            )
        if self.test_path is not None and self.dataset != "shards":
            raise ValueError(f"test_path is for shards; leave it out for {self.dataset!r}")
        if self.dataset == "scenes" and not self.reads_label_maps:
            raise ValueError("dataset 'scenes' has labels of pixels, but labels of images are needed here")
        return self


class DataConfig(ImagesConfig):
    """The images of a pretraining run, and how its levels read them.

    With label maps the head and mask levels classify pixels.
    """

    reads_label_maps: ClassVar[bool] = True

    augment: Literal["none", "shift", "crop-flip", "resized-crop"] = Field(
        "none",
        description="shift: 1-pixel translation; crop-flip: pad, crop, flip (CIFAR); "
        "resized-crop: RandomResizedCrop(0.2, 1) and flip (MAE)",
    )
    access: Literal["auto", "random", "sequential"] = Field(
        "auto",
        description="of shards. sequential: front to back, for network disks and what is no file; "
        "auto: random for files",
    )
    shuffle_buffer: Positive = Field(
        4096, description="images per level in memory to be shuffled, where shards are read sequentially"
    )
    resident: Literal["auto", "always", "never"] = Field(
        "auto",
        description="keep whole sets as bytes on the device and augment there; auto: up to 1 GiB, where "
        "the run reads a set at least twice; not with resized-crop, which needs the originals",
    )
    train: str = Field("training", description="of scenes: folder in images/ and annotations/ to train on")
    test: str = Field("validation", description="of scenes: folder in both to test on")
    num_classes: Positive | None = Field(
        None, description="of scenes: classes, whose label values follow on first_label"
    )
    first_label: int = Field(0, ge=0, le=254, description="of scenes: value of the first class; ADE20K: 1")
    void: tuple[int, ...] = Field(
        (), description="of scenes: values that count nowhere, as 255 does; ADE20K: [0]"
    )

    @property
    def has_label_maps(self) -> bool:
        """Whether labels are maps [H, W], one for each image, and not class numbers."""
        return self.dataset == "scenes"

    @model_validator(mode="after")
    def _check_fields_of_one_set(self) -> DataConfig:
        if self.access != "auto" and self.dataset != "shards":
            raise ValueError(f"access {self.access!r} is for shards; leave it out for {self.dataset!r}")
        if self.has_label_maps and self.num_classes is None:
            raise ValueError("num_classes is missing; how many classes do the label maps have?")
        for name in ("train", "test", "num_classes", "first_label", "void"):
            value = getattr(self, name)
            if not self.has_label_maps and value != DataConfig.model_fields[name].default:
                raise ValueError(f"{name} {value!r} is for scenes; leave it out for {self.dataset!r}")
        return self


class LevelConfig(Section):
    """Optimisation of one level: AdamW, linear warm-up, then cosine decay to ``min_lr``."""

    batch_size: Positive = Field(256, description="global batch, summed over ranks")
    lr: NonNegative = Field(1e-3, description="highest learning rate")
    min_lr: NonNegative = Field(0.0, description="learning rate of the last iteration")
    warmup: Share = Field(0.05, description="share of the run spent in linear warm-up")
    weight_decay: NonNegative = Field(0.05, description="of matrices only")
    betas: tuple[Share, Share] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    clip: NonNegative = Field(0.0, description="global gradient norm limit; 0 switches clipping off")

    @model_validator(mode="after")
    def _check(self) -> LevelConfig:
        if self.min_lr > self.lr:
            raise ValueError(f"min_lr {self.min_lr} is above lr {self.lr}")
        if any(beta >= 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must be below 1")
        return self


class PretrainConfig(LevelConfig):
    """Level 1: the masked autoencoder."""

    unroll_steps: Positive = Field(2, description="pretrain steps per outer iteration (K)")
    micro_batches: Positive = Field(
        1, description="parts of a rank's batch, one after the other (gradient accumulation)"
    )
    label_weight: NonNegative = Field(
        0.0, description="of a classification loss on the kept patches, beside the reconstruction"
    )


class HeadConfig(LevelConfig):
    """Level 2: the classifier on the encoder's features."""

    weight_decay: NonNegative = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)


class MaskConfig(LevelConfig):
    """Level 3: the masking network, driven by the hypergradient."""

    lr: NonNegative = 1e-3
    weight_decay: NonNegative = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)
    # A hypergradient carries the factor lr(pretrain) / batch: an ordinary 1e-8 would damp the step.
    eps: float = Field(1e-12, gt=0)


class HypergradientConfig(Section):
    """How the mask level's gradient is computed (docs/hypergradient.md)."""

    estimator: Literal["auto", "fd", "fd-forward", "jvp", "exact"] = Field(
        "auto",
        description="of each patch's influence. fd: central difference, two forward passes; fd-forward: "
        "one-sided, one pass; jvp: forward-mode derivative; exact: double backward, for tiny models; "
        "auto: jvp under bf16 autocast, else fd",
    )
    precision: Literal["auto", "float32", "engine"] = Field(
        "auto",
        description="of the influence. engine: as the pretrain step runs; "
        "auto: float32 for fd and exact, engine for fd-forward and jvp",
    )
    radius: Literal["auto"] | Annotated[float, Field(gt=0, lt=1)] = Field(
        "auto", description="of a finite difference, relative to ||theta||; auto follows its error"
    )
    check_every: int = Field(
        100, ge=0, description="hypergradients between checks against half and double the radius; 0: never"
    )
    best_response: Literal["one-step", "implicit"] = Field(
        "one-step", description="of the head (levels 3). implicit: trained to optimality at the features"
    )
    damping: float = Field(1e-2, gt=0, description="of implicit: pull of the head's optimum to its weights")
    precondition: Literal["none", "adam"] = Field(
        "none", description="adam: v goes through the derivative of the pretrain level's AdamW step (SAMA)"
    )
    every: Positive = Field(
        4, description="outer iterations per hypergradient; between them only pretrain and head step"
    )
    share: float = Field(1.0, gt=0, le=1, description="share of the pretrain batch whose influence is taken")

    def resolve_estimator(self, bf16: bool, whole_weights: bool) -> str:
        """What ``auto`` stands for; other names are what they are.

        Args:
            bf16: whether the passes run under bf16 autocast.
            whole_weights: whether every rank has whole weights, which ZeRO 3 does not keep.
        """
        if self.estimator != "auto":
            return self.estimator
        return "jvp" if bf16 and whole_weights else "fd"


class ComputeConfig(Section):
    """How the arithmetic is carried out: speed, memory and rounding, never the method."""

    precision: Literal["auto", "bf16", "tf32", "float32"] = Field(
        "auto",
        description="of the passes; weights and losses are float32 in any case. bf16: autocast; tf32: "
        "float32 with products rounded to TF32; auto: bf16 on a GPU, else float32",
    )
    execution: Literal["auto", "eager", "compiled", "graphs"] = Field(
        "auto",
        description="compiled: torch.compile; graphs: and CUDA graphs, for small models; "
        "auto: compiled on a GPU, else eager",
    )
    activation_checkpointing: bool = Field(
        False, description="recompute the blocks in the backward pass: less memory, a third more time"
    )


class EvalConfig(Section):
    """Final evaluation on the test set."""

    batch_size: Positive = 256
    knn_k: Positive = Field(5, description="neighbours of the k-NN classifier")
    pixels: bool = Field(False, description="score raw pixels too, as the baseline without an encoder")


class FailureConfig(Section):
    """What a run does about numbers that are not finite, and about lost ranks (docs/reliability.md)."""

    skips: int = Field(
        3, ge=0, description="iterations in a row with a step that is skipped, its gradient not being finite"
    )
    rewinds: int = Field(
        2, ge=0, description="returns to the last checkpoint, with the next data, where a level breaks"
    )
    lost_after: float = Field(60.0, gt=0, description="seconds without a sign of life of a rank")
    stuck_after: float = Field(1800.0, gt=0, description="seconds without progress of any rank")
