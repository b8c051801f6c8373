"""A study file, and the runs that it asks for.

A study compares *arms*: settings of the same recipe, each with all seeds and under every budget. An arm that
is compared names another one, its baseline. ``steps`` is what the baseline gets; under the budget *steps* an
arm takes as many pretrain steps, under *flops* as many as its model FLOPs (``mlomae.flops``) buy.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from mlomae.arguments import did_you_mean
from mlomae.config import RESUMABLE_CHANGES, Config, flatten, load_config, read_yaml
from mlomae.config_errors import describe
from mlomae.errors import UserError
from mlomae.flops import iteration_flops
from mlomae.recipes import find_recipe
from mlomae.run_dir import RunDir, Status
from mlomae.sections import Positive, Section

Budget = Literal["steps", "flops"]
Task = Literal["knn", "linear", "finetune", "segment", "detect"]
Settings = dict[str, Any]

# What the study itself decides for each of its runs.
_OWNED = ("seed", "iterations", "run_dir")


class Arm(Section):
    """One way to pretrain."""

    set: Settings = Field({}, description="fields, dotted or nested, on top of the study's")
    against: str | None = Field(None, description="the arm that it is compared with")
    start_from: str | None = Field(None, description="the arm whose encoder of the same seed it starts from")
    steps: Positive | None = Field(None, description="instead of the study's; a baseline's only")
    budgets: tuple[Budget, ...] | None = Field(None, description="instead of the study's")
    seeds: tuple[int, ...] | None = Field(None, description="instead of the study's")


class Evaluation(Section):
    """One evaluation of encoders, beside those at the end of a run."""

    arms: tuple[str, ...] | None = Field(None, description="whose encoders; all without it")
    config: Path | None = Field(None, description="recipe of `mlomae eval`")
    set: Settings = Field({}, description="fields, dotted or nested, on top of the recipe")

    def words(self, task: str, run: Path) -> list[str]:
        """The command after ``mlomae``.

        Raises:
            UserError: there is no such recipe.
        """
        recipe = [] if self.config is None else ["--config", str(find_recipe(self.config))]
        return [
            "eval",
            task,
            str(run),
            "--out",
            str(self.folder(task, run)),
            *recipe,
            *as_flags(in_yaml(self.set)),
        ]

    def folder(self, task: str, run: Path) -> Path:
        """Of the results; another one for other settings.

        Raises:
            UserError: there is no such recipe, or it cannot be read.
        """
        recipe = None
        if self.config is not None:
            try:
                recipe = find_recipe(self.config).read_text()
            except OSError as error:
                raise UserError(
                    f"evaluate.{task}.config: {self.config} cannot be read ({error.strerror})"
                ) from None
        digest = hashlib.sha256(json.dumps([recipe, in_yaml(self.set)]).encode()).hexdigest()
        return run / "eval" / f"{task}-{digest[:8]}"


class Study(Section):
    """A study file."""

    recipe: Path = Field(Path("digits"), description="of all runs: a file, or the name of a recipe")
    set: Settings = Field({}, description="fields of the configuration, for all arms")
    steps: Positive = Field(1000, description="pretrain steps of a baseline")
    budgets: tuple[Budget, ...] = Field(("flops",), min_length=1)
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    arms: dict[str, Arm] = Field({"random": Arm()}, min_length=1)
    evaluate: dict[Task, Evaluation] = Field({}, description="evaluations of encoders")

    def seeds_of(self, arm: str) -> frozenset[int]:
        """The seeds of an arm's runs."""
        own = self.arms[arm].seeds
        return frozenset(self.seeds if own is None else own)

    def evaluations_of(self, arm: str) -> dict[Task, Evaluation]:
        """The evaluations of an arm's encoders."""
        return {
            task: found for task, found in self.evaluate.items() if found.arms is None or arm in found.arms
        }


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        budgets: under which it counts; arms with the FLOPs of their baseline share one run.
        settings: dotted field → value in YAML syntax, on top of the recipe.
        config: the resolved configuration.
        flops: of its pretraining.
        source: run whose encoder it starts from.
    """

    arm: str
    seed: int
    budgets: tuple[Budget, ...]
    settings: dict[str, str]
    config: Config
    flops: float
    source: Path | None

    @property
    def name(self) -> str:
        """Of its folder, below that of the study's runs."""
        return f"{self.arm}/{self.config.iterations}-seed{self.seed}"

    @property
    def path(self) -> Path:
        """Of its folder."""
        return self.config.run_dir

    @property
    def trained(self) -> bool:
        """Whether its folder holds a result of this very configuration."""
        try:
            return RunDir(self.path, self.config).claim(primary=False) is Status.COMPLETE
        except UserError:  # of another one, or none of a run
            return False

    @property
    def flags(self) -> list[str]:
        """Of ``mlomae train``, beside the recipe."""
        return [*as_flags(self.settings), "--run-dir", str(self.path)]

    def digest(self, study: Study) -> str:
        """Of everything that decides its figures: by this a results file knows it again."""
        # Without defaults: fields that are added to the configuration later do not change it.
        fields = flatten(self.config.model_dump(mode="json", exclude_defaults=True))
        decides = {name: value for name, value in fields.items() if name not in RESUMABLE_CHANGES}
        if self.source is not None:
            decides["model.weights"] = "/".join(self.source.parts[-2:])
        chosen = study.evaluations_of(self.arm).items()
        evaluations = [evaluation.folder(task, Path()).name for task, evaluation in chosen]
        return hashlib.sha256(json.dumps([decides, evaluations], sort_keys=True).encode()).hexdigest()[:16]

    @property
    def pretrain_steps(self) -> int:
        return self.config.iterations * self.config.pretrain.unroll_steps


def in_yaml(settings: Settings) -> dict[str, str]:
    """Dotted field → value as it stands on a command line."""
    # The first line: a scalar's document has an end mark after it.
    return {
        field: yaml.safe_dump(value, default_flow_style=True, width=10**6).splitlines()[0]
        for field, value in flatten(settings).items()
    }


def as_flags(fields: Mapping[str, str]) -> list[str]:
    """{'pretrain.lr': '1e-4'} → ['--pretrain.lr', '1e-4']."""
    return [word for field, value in fields.items() for word in (f"--{field}", value)]


def load_study(path: Path) -> Study:
    """Reads a study file.

    Raises:
        UserError: one line naming the file or field, what was found and what would be right.
    """
    tree = read_yaml(path, f"study {path}")
    if not isinstance(tree, dict) or not isinstance(tree.get("arms"), dict):
        raise UserError(f"study {path}: expected a mapping with the field arms; see docs/studies.md")
    try:
        study = Study.model_validate(tree)
        _check(study)
    except ValidationError as error:
        raise UserError(f"study {path}: {describe(error, Study)}") from None
    except UserError as error:
        raise UserError(f"study {path}: {error}") from None
    return study


def _check(study: Study) -> None:
    """Refuses names and settings that do not go together."""
    _refuse_owned("set", study.set)
    for task, evaluation in study.evaluate.items():
        for name in evaluation.arms or ():
            if name not in study.arms:
                raise UserError(f"evaluate.{task}.arms: {name!r} is no arm; {did_you_mean(name, study.arms)}")
    for name, arm in study.arms.items():
        where = f"arms.{name}"
        if not re.fullmatch(r"\w[\w-]*", name, re.ASCII):
            raise UserError(f"{where}: names become folders; use letters, digits, - and _ only")
        for field, other in (("against", arm.against), ("start_from", arm.start_from)):
            if other is None:
                continue
            if other not in study.arms or other == name:
                near = did_you_mean(other, (known for known in study.arms if known != name))
                raise UserError(f"{where}.{field}: {other!r} is no other arm; {near}")
            if getattr(study.arms[other], field) is not None:
                raise UserError(f"{where}.{field}: {other} has this field too; name an arm without it")
            if missing := study.seeds_of(name) - study.seeds_of(other):
                raise UserError(f"{where}.seeds: {other} has no runs of {sorted(missing)}")
        if arm.against is not None:
            wanted, there = (set(study.arms[one].budgets or study.budgets) for one in (name, arm.against))
            if wanted - there:
                lacking = ", ".join(sorted(wanted - there))
                raise UserError(f"{where}.budgets: {arm.against} has no runs under {lacking}")
        if arm.steps is not None and arm.against is not None:
            raise UserError(f"{where}.steps: belongs to its baseline, {arm.against}")
        _refuse_owned(f"{where}.set", arm.set)


def _refuse_owned(where: str, settings: Settings) -> None:
    for field in _OWNED:
        if field in flatten(settings):
            raise UserError(f"{where}.{field}: the study decides it; leave it out")


def plan_runs(study: Study, runs: Path, on_gpus: bool = False) -> list[PlannedRun]:
    """All runs, seed after seed, so that what is done first can be compared first.

    Args:
        runs: the folder of their folders.
        on_gpus: where they will run, which decides what ``auto`` is, and so the FLOPs.

    Raises:
        UserError: a setting is wrong; or the budget of an arm does not buy one iteration.
    """
    lengths = {name: _lengths(study, name, on_gpus) for name in study.arms}
    seeds = sorted({seed for name in study.arms for seed in study.seeds_of(name)})
    # A run whose encoder others start from comes before them.
    names = sorted(study.arms, key=lambda name: study.arms[name].start_from is not None)
    planned: list[PlannedRun] = []
    for seed in seeds:
        for name in (name for name in names if seed in study.seeds_of(name)):
            start_from = study.arms[name].start_from
            source = next((run.path for run in planned if (run.arm, run.seed) == (start_from, seed)), None)
            for iterations, budgets in lengths[name].items():
                settings = {"seed": str(seed), "iterations": str(iterations)}
                folder = runs / f"{name}/{iterations}-seed{seed}"
                config = _resolve(study, name, settings | {"run_dir": str(folder)}, source)
                flops = iterations * _flops(config, on_gpus)
                words = _settings(study, name, source) | settings
                planned.append(PlannedRun(name, seed, budgets, words, config, flops, source))
    return planned


def _lengths(study: Study, name: str, on_gpus: bool) -> dict[int, tuple[Budget, ...]]:
    """Outer iterations that an arm takes, and the budgets under which it takes so many."""
    arm, base = study.arms[name], study.arms[name].against or name
    own, lower = (_resolve(study, arm_or_base, {}, None) for arm_or_base in (name, base))
    steps = study.arms[base].steps or study.steps
    found: dict[int, tuple[Budget, ...]] = {}
    for budget in arm.budgets or study.budgets:
        iterations = steps / own.pretrain.unroll_steps
        if budget == "flops":
            iterations = steps / lower.pretrain.unroll_steps * _flops(lower, on_gpus) / _flops(own, on_gpus)
        whole = round(iterations)
        if not whole:
            raise UserError(f"arms.{name}: {steps} steps of its baseline do not buy one outer iteration")
        found[whole] = (*found.get(whole, ()), budget)
    return found


def _flops(config: Config, on_gpus: bool) -> float:
    """Of one outer iteration."""
    precision = config.compute.precision
    bf16 = precision == "bf16" or (precision == "auto" and on_gpus and config.device != "cpu")
    estimator = config.hypergradient.resolve_estimator(bf16, whole_weights=True)
    return sum(iteration_flops(config, estimator=estimator).values())


def _settings(study: Study, name: str, source: Path | None) -> dict[str, str]:
    given = in_yaml(study.set) | in_yaml(study.arms[name].set)
    return given if source is None else given | {"model.weights": str(source)}


def _resolve(study: Study, name: str, more: Mapping[str, str], source: Path | None) -> Config:
    try:
        return load_config(study.recipe, _settings(study, name, source) | dict(more))
    except UserError as error:
        raise UserError(f"arms.{name}: {error}") from None
