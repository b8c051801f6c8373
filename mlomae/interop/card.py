"""The model card that goes with an export: Markdown, with the front matter of the Hugging Face hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from mlomae import __version__
from mlomae.config import Config, flatten, load_config
from mlomae.errors import UserError
from mlomae.interop.pretrained import Pretrained
from mlomae.interop.runs import CONFIG
from mlomae.interop.targets import Target
from mlomae.models.encoder import SIZES, num_pooled

# What a reader needs to judge or repeat the training; no paths, which tell of a machine.
_RECIPE = (
    "seed", "iterations", "levels", "model.arch", "model.img_size", "model.patch_size", "model.in_chans",
    "model.decoder_dim", "model.decoder_depth", "model.decoder_heads", "model.norm_pix", "model.pool",
    "masking.policy", "masking.ratio", "masking.network", "masking.selection", "masking.random_share",
    "data.dataset", "data.augment", "data.heldout_fraction", "data.split_seed",
    "pretrain.batch_size", "pretrain.lr", "pretrain.min_lr", "pretrain.warmup", "pretrain.weight_decay",
    "pretrain.betas", "pretrain.unroll_steps", "hypergradient.estimator", "hypergradient.every",
    "compute.precision",
)  # fmt: skip
_ONE_POOL = """

Features here are the class token joined with the mean of the patch tokens. Those of this library are the
class token alone; its tokens are the same."""
# Of an evaluation, beside its figures.
_ABOUT = ("time", "out", "encoder", "task", "scratch")


def model_card(pretrained: Pretrained, target: Target, name: str) -> str:
    """The card of an export.

    Args:
        name: of its file or folder.

    Raises:
        UserError: the run's own records are damaged.
    """
    run = pretrained.run
    config = None if run is None else load_config(run / CONFIG, {})
    parts = [_front_matter(target, config), f"# {name}", _about(pretrained, config)]
    parts += ["## Loading", _loading(pretrained, target, name)]
    if run is not None and config is not None:
        parts += ["## Training", _data(config), _recipe(config), _figures(run)]
    parts += ["## Licence", _licence(pretrained, config)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(target: Target, config: Config | None) -> str:
    fields: dict[str, Any] = {
        "library_name": target.library,
        "pipeline_tag": "image-feature-extraction",
        "tags": ["vit", "mae", "mlomae", "self-supervised"],
    }
    if config is not None and config.data.dataset in ("cifar10", "cifar100"):
        fields["datasets"] = [config.data.dataset]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False)}---"


def _about(pretrained: Pretrained, config: Config | None) -> str:
    width, depth, heads = SIZES[pretrained.arch]
    if config is None:
        what = (
            f"A Vision Transformer, read from `{pretrained.source.name}` and written by mlomae {__version__}."
        )
    else:
        mask = "a learned mask" if config.masking.learns else f"{config.masking.policy} masks"
        what = (
            f"A Vision Transformer, pretrained as a masked autoencoder with {mask} "
            f"by [mlomae](https://arxiv.org/abs/2402.18128) {__version__}."
        )
    height, columns = pretrained.img_size
    rows = {
        "architecture": f"{pretrained.arch}: width {width}, {depth} blocks, {heads} heads",
        "images": f"{height} x {columns} pixels, {pretrained.in_chans} channels, "
        f"patches of {pretrained.patch_size} x {pretrained.patch_size}",
        "features": f"{num_pooled(width, pretrained.pool)} numbers: {pretrained.pool} of the tokens",
        "mean, std": f"{list(pretrained.mean)}, {list(pretrained.std)}, of values in [0, 1]",
        "layer norm": "eps 1e-6",
    }
    return f"{what}\n\n{_table(('', ''), rows.items())}"


def _loading(pretrained: Pretrained, target: Target, name: str) -> str:
    shape = ", ".join(map(str, (1, pretrained.in_chans, *pretrained.img_size)))
    imports = "\n".join(sorted(["import torch", target.imports], key=lambda line: (line[:4] == "from", line)))
    images = f"images = torch.zeros({shape})  # normalised with the mean and std above"
    code = f"{imports.strip()}\n\n{images}\n{target.loading.format(name=name)}"
    return f"```python\n{code}\n```" + (_ONE_POOL if "+" in pretrained.pool and target.folder else "")


def _data(config: Config) -> str:
    data = config.data
    name = data.dataset if data.path is None else f"{data.dataset}, `{Path(data.path).name}`"
    return f"Data set: {name}."


def _recipe(config: Config) -> str:
    fields = flatten(config.model_dump(mode="json"))
    lines = [f"{name}: {json.dumps(fields[name])}" for name in _RECIPE]
    return "Recipe, as resolved:\n\n```yaml\n" + "\n".join(lines) + "\n```"


def _figures(run: Path) -> str:
    rows: list[tuple[str, str]] = []
    if (run / "result.json").is_file():
        rows.append(("after pretraining, test set", _values(_parse(run / "result.json", 1))))
    evaluations = run / "evaluations.jsonl"
    if evaluations.is_file():
        for number, _ in enumerate(evaluations.read_text().splitlines(), start=1):
            row = _parse(evaluations, number)
            scratch = ", from scratch" if row.get("scratch") else ""
            rows.append((f"{row.get('task')}{scratch}", _values(row)))
    return _table(("evaluation", "figures"), rows) if rows else ""


def _parse(path: Path, number: int) -> Mapping[str, Any]:
    """The object in a file of JSON or, of one with an object a line, in a line."""
    text = path.read_text()
    try:
        content = json.loads(text if path.suffix == ".json" else text.splitlines()[number - 1])
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{path}: line {number} is no JSON object; repair or remove it")
    return content


def _values(row: Mapping[str, Any]) -> str:
    numbers = {
        name: value
        for name, value in row.items()
        if name not in _ABOUT and isinstance(value, int | float | str) and not isinstance(value, bool)
    }
    return ", ".join(f"{name} {value}" for name, value in numbers.items())


def _licence(pretrained: Pretrained, config: Config | None) -> str:
    text = (
        "The code of mlomae is MIT. The licence of these weights is for those who trained them to state: it "
    )
    text += "depends on the data."
    if config is None:
        return f"{text} They come from `{pretrained.source.name}`: check the source's licence."
    if config.model.weights is not None:
        origin = Path(config.model.weights).name
        return f"{text} The training started from `{origin}`: check the source's licence, which may go on."
    return text


def _table(head: tuple[str, str], rows: Iterable[tuple[str, str]]) -> str:
    lines = [head, ("---", "---"), *rows]
    return "\n".join(f"| {left} | {right} |" for left, right in lines)
