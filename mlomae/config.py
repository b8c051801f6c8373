"""The typed configuration tree of one run; every check that needs no data or device lives here.

A run is a YAML file (a *recipe*) plus dotted overrides. The recipe owns batch sizes, learning rates,
schedules, clipping and precision; a DeepSpeed config owns ZeRO and communication
(``mlomae.distributed.ds_config``).
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import Field, ValidationError, model_validator

from mlomae.config_errors import describe
from mlomae.errors import UserError
from mlomae.recipes import find_recipe
from mlomae.sections import (
    ComputeConfig,
    DataConfig,
    Display,
    EvalConfig,
    FailureConfig,
    HeadConfig,
    HypergradientConfig,
    Loggers,
    MaskConfig,
    MaskingConfig,
    ModelConfig,
    Positive,
    PretrainConfig,
    Section,
)

Tree = TypeVar("Tree", bound=Section)


class Config(Section):
    """One run."""

    seed: int = Field(0, ge=0, description="of weights, batches and noise")
    iterations: Positive = Field(200, description="outer iterations: K pretrain steps, head step, mask step")
    levels: Literal[2, 3] = Field(3, description="2 leaves the head's best response out of the hypergradient")
    run_dir: Path = Field(Path("runs/default"), description="folder that receives everything the run leaves")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = Field(False, description="refuse what may differ between two runs of the same kind")
    log_every: Positive = Field(10, description="iterations between lines of metrics.jsonl")
    display: Display = "auto"
    loggers: Loggers = ("tensorboard",)
    checkpoint_every: Positive = Field(100, description="iterations between checkpoints")
    picture_every: Positive = Field(100, description="iterations between pictures of the mask")
    keep_checkpoints: Positive = Field(2, description="checkpoints kept")
    model: ModelConfig = ModelConfig()
    masking: MaskingConfig = MaskingConfig()
    data: DataConfig = DataConfig()
    pretrain: PretrainConfig = PretrainConfig()
    head: HeadConfig = HeadConfig()
    mask: MaskConfig = MaskConfig()
    hypergradient: HypergradientConfig = HypergradientConfig()
    compute: ComputeConfig = ComputeConfig()
    eval: EvalConfig = EvalConfig()
    failure: FailureConfig = FailureConfig()

    @property
    def num_keep(self) -> int:
        """Patches kept per image: int(L * (1 - ratio)), guarded against float truncation."""
        return int(self.model.num_patches * (1 - self.masking.ratio) + 1e-9)

    @model_validator(mode="after")
    def _check(self) -> Config:
        patches = self.model.num_patches
        if not 0 < self.num_keep < patches:
            raise ValueError(
                f"masking.ratio {self.masking.ratio} keeps {self.num_keep} of {patches} patches; "
                "at least one must be kept and one removed"
            )
        if self.compute.execution == "graphs" and self.pretrain.micro_batches > 1:
            # A graph's next replay would write over the gradients that are to be added up.
            raise ValueError(
                "compute.execution: graphs works with pretrain.micro_batches 1 only; use compiled"
            )
        return self


# Fields that may change when a run directory is resumed: none of them changes what is computed.
RESUMABLE_CHANGES = {
    "run_dir", "device", "display", "loggers", "log_every", "checkpoint_every", "picture_every",
    "keep_checkpoints",
    "data.path", "data.test_path", "data.download", "data.max_bad_share", "data.workers", "data.resident",
    "model.attention", "model.predict", "pretrain.micro_batches", "compute.execution",
    "compute.activation_checkpointing", "failure.lost_after", "failure.stuck_after",
    "failure.skips", "failure.rewinds",
}  # fmt: skip


def load_config(path: Path | None, overrides: dict[str, str]) -> Config:
    """``load_tree`` of a run."""
    return load_tree(path, overrides, Config)


def load_run(run: Path, overrides: dict[str, str]) -> Config:
    """The configuration of a run directory, which may be a stranger's: no command in it will be run.

    Raises:
        UserError: see ``load_tree``; or its images come from a command that ``overrides`` do not replace.
    """
    config = load_config(run / "config.yaml", overrides)
    refuse_commands(run, config.data, {name.removeprefix("data.") for name in overrides})
    return config


def refuse_commands(run: Path, data: DataConfig, given: Collection[str]) -> None:
    """Refuses to run what a run's configuration, and not the user, names as a command.

    Args:
        given: fields of ``data`` that the user has set.

    Raises:
        UserError: there is one.
    """
    for name, value in (("path", data.path), ("test_path", data.test_path)):
        if name not in given and str(value).startswith("pipe:"):
            raise UserError(
                f"data.{name}: {run / 'config.yaml'} names a command, which is run only if you give it: "
                f"--data.{name} {str(value)!r}"
            )


def load_tree(path: Path | None, overrides: dict[str, str], root: type[Tree]) -> Tree:
    """Reads a recipe, applies dotted overrides (values in YAML syntax) and validates the tree.

    Args:
        path: of the recipe, or its name where there is no such file.
        root: what the recipe describes.

    Raises:
        UserError: one line naming the file or field, what was found and what would be right.
    """
    tree: dict[str, Any] = {}
    if path is not None:
        path = find_recipe(path)
        loaded = read_yaml(path, f"--config {path}")
        if loaded is not None and not isinstance(loaded, dict):
            raise UserError(f"--config {path}: found {type(loaded).__name__}, expected a mapping of fields")
        tree = loaded or {}
    for key, text in overrides.items():
        _assign(tree, key, text)
    try:
        return root.model_validate(tree)
    except ValidationError as error:
        raise UserError(describe(error, root)) from None


def read_yaml(path: Path, where: str) -> Any:
    """Whatever a YAML file holds.

    Args:
        where: begins the message of an error.

    Raises:
        UserError: it cannot be read, or is no YAML.
    """
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: no text, or an impossible date
        raise UserError(f"{where}: not valid YAML ({' '.join(str(error).split())})") from None


def dump_config(config: Section) -> str:
    """The resolved tree as YAML that ``load_tree`` reads back to an equal tree."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} → {'a.b': 1}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, dict) else {name: value})
    return flat


def _assign(tree: dict[str, Any], key: str, text: str) -> None:
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise UserError(f"--{key}: {text!r} is not a YAML value") from None
    *parents, leaf = key.split(".")
    node = tree
    for parent in parents:
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise UserError(f"--{key}: {parent!r} is a value in the recipe, not a section")
    node[leaf] = value
