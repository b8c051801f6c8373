"""From a study file to its runs: budgets, order, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mlomae.config import load_config
from mlomae.errors import UserError
from mlomae.flops import iteration_flops
from mlomae.study.plan import PlannedRun, load_study, plan_runs
from tests.architecture.source_tree import ROOT
from tests.study.made import ARMS, write_study


def plan(folder: Path, **fields: Any) -> list[PlannedRun]:
    return plan_runs(load_study(write_study(folder, **fields)), folder / "runs")


def test_budgets_are_those_of_the_baseline(tmp_path: Path) -> None:
    random, steps, flops = plan(tmp_path, steps=1000)

    assert (random.arm, random.budgets, random.pretrain_steps) == ("random", ("steps", "flops"), 1000)
    assert (steps.budgets, steps.pretrain_steps) == (("steps",), 1000)
    # Within half an outer iteration of what the baseline costs, by the FLOPs of a whole iteration.
    each = sum(iteration_flops(flops.config).values())
    assert flops.budgets == ("flops",) and flops.pretrain_steps < 1000
    assert abs(flops.flops - random.flops) <= each / 2
    assert flops.flops == pytest.approx(each * flops.config.iterations)


def test_equal_steps_are_pretrain_steps_whatever_is_unrolled(tmp_path: Path) -> None:
    arms = {"random": ARMS["random"], "four": {"set": {"pretrain.unroll_steps": 4}, "against": "random"}}
    *_, four = plan(tmp_path, steps=80, arms=arms, budgets=["steps"])
    assert (four.config.iterations, four.pretrain_steps) == (20, 80)


def test_a_baseline_may_have_its_own_steps(tmp_path: Path) -> None:
    half = {"set": {"masking.policy": "random", "masking.ratio": 0.75}, "steps": 40}
    other = {"set": {"masking.ratio": 0.75}, "against": "random-75"}
    runs = plan(tmp_path, steps=80, budgets=["steps"], arms={"random-75": half, "learned-75": other})
    assert {run.pretrain_steps for run in runs} == {40}


def test_settings_of_an_arm_win_and_reach_the_configuration(tmp_path: Path) -> None:
    arms = {"a": {"set": {"masking": {"ratio": 0.25}, "pretrain.betas": [0.9, 0.99]}}, "b": {}}
    a, b = plan(tmp_path, set={"masking.ratio": 0.75, "pretrain.lr": 1e-5}, arms=arms)

    assert (a.config.masking.ratio, b.config.masking.ratio) == (0.25, 0.75)
    assert a.config.pretrain.betas == (0.9, 0.99) and a.config.pretrain.lr == 1e-5
    # What the command line is given resolves to the same run.
    words = a.settings | {"run_dir": str(a.path)}
    assert load_config(tmp_path / "tiny.yaml", words) == a.config


def test_seed_after_seed_and_sources_before_what_starts_from_them(tmp_path: Path) -> None:
    arms = {"continued": {"start_from": "random", "against": "random", "seeds": [1]}, **ARMS}
    runs = plan(tmp_path, arms=arms, seeds=[0, 1])

    assert [run.seed for run in runs] == sorted(run.seed for run in runs)
    (continued,) = (run for run in runs if run.arm == "continued")
    (source,) = (run for run in runs if (run.arm, run.seed) == ("random", 1))
    assert continued.source == source.path and runs.index(source) < runs.index(continued)
    assert continued.config.model.weights == str(source.path)


def test_an_arms_own_estimator_and_the_device_decide_its_flops(tmp_path: Path) -> None:
    base = {"hypergradient.check_every": 0}
    arms = {
        name: {"set": {**base, "hypergradient.estimator": name}}
        for name in ("auto", "fd", "fd-forward", "jvp")
    }
    study = load_study(write_study(tmp_path, arms=arms, budgets=["steps"]))

    def flops(on_gpus: bool) -> dict[str, float]:
        return {run.arm: run.flops for run in plan_runs(study, tmp_path, on_gpus)}

    on_cpus, on_gpus = flops(False), flops(True)
    assert on_cpus["fd-forward"] < on_cpus["fd"] < on_cpus["jvp"]
    # The recipe says cpu, whatever is there.
    assert on_cpus == on_gpus and on_cpus["auto"] == on_cpus["fd"]
    study = load_study(write_study(tmp_path, arms=arms, budgets=["steps"], set={"device": "auto"}))
    assert flops(False)["auto"] == on_cpus["fd"] and flops(True)["auto"] == on_cpus["jvp"]


def test_every_run_has_its_own_folder(tmp_path: Path) -> None:
    runs = plan(tmp_path, steps=100, seeds=[0, 1, 2])
    assert len({run.path for run in runs}) == len(runs) == 9
    assert all(run.path == tmp_path / "runs" / run.name for run in runs)


def test_digest_tells_runs_apart_by_what_decides_their_figures(tmp_path: Path) -> None:
    arms = {**ARMS, "continued": {"start_from": "random", "against": "random", "budgets": ["steps"]}}

    def digests(**fields: Any) -> list[str]:
        study = load_study(write_study(tmp_path, arms=arms, **fields))
        return [run.digest(study) for run in plan_runs(study, tmp_path / "runs")]

    first = digests()
    assert len(set(first)) == 4
    # Neither folders nor what changes no figure.
    moved = load_study(tmp_path / "study.yaml")
    assert [run.digest(moved) for run in plan_runs(moved, tmp_path / "elsewhere")] == first
    assert digests(set={"log_every": 7}) == first
    for fields in ({"set": {"pretrain.lr": 1e-5}}, {"seeds": [1]}, {"steps": 800}, {"evaluate": {"knn": {}}}):
        assert not set(first) & set(digests(**fields))
    # An evaluation of some arms leaves the figures of the others as they were.
    some = digests(evaluate={"knn": {"arms": ["learned"]}})
    assert len(set(first) & set(some)) == 2


def test_another_evaluation_has_another_folder(tmp_path: Path) -> None:
    folders = set()
    for number, evaluation in enumerate(({}, {"set": {"ks": [1]}}, {"config": str(tmp_path / "knn.yaml")})):
        (tmp_path / "knn.yaml").write_text("ks: [3]\n")
        (tmp_path / str(number)).mkdir()
        study = load_study(write_study(tmp_path / str(number), evaluate={"knn": evaluation}))
        words = study.evaluate["knn"].words("knn", Path("run"))
        folders.add(words[words.index("--out") + 1])
        assert words[:3] == ["eval", "knn", "run"]
    (tmp_path / "knn.yaml").write_text("ks: [5]\n")
    folders.add(str(study.evaluate["knn"].folder("knn", Path("run"))))
    assert len(folders) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            "arms: {a: {against: randm}, random: {}}",
            "arms.a.against: 'randm' is no other arm; did you mean 'random'?",
        ),
        ("arms: {a: {against: a}, b: {}}", "arms.a.against: 'a' is no other arm; known: b"),
        ("arms: {a: {}, b: {against: a}, c: {against: b}}", "arms.c.against: b has this field too"),
        ("arms: {a: {}, b: {start_from: a}, c: {start_from: b}}", "arms.c.start_from: b has this field too"),
        ("arms: {a: {}, b: {against: a, steps: 4}}", "arms.b.steps: belongs to its baseline, a"),
        ("arms: {a: {}, b: {against: a, seeds: [0, 7]}}", "arms.b.seeds: a has no runs of [7]"),
        (
            "arms: {a: {budgets: [flops]}, b: {against: a, budgets: [steps]}}",
            "arms.b.budgets: a has no runs under steps",
        ),
        ("arms: {a/b: {}}", "arms.a/b: names become folders"),
        ("arms: {a: {sett: {}}}", "arms.a.sett: unknown key; did you mean 'set'?"),
        ("arms: {a: {set: {seed: 3}}}", "arms.a.set.seed: the study decides it"),
        ("set: {iterations: 3}", "set.iterations: the study decides it"),
        ("budget: [steps]", "budget: unknown key; did you mean 'budgets'?"),
        ("budgets: [time]", "budgets.0: input should be 'steps' or 'flops', found 'time'"),
        ("evaluate: {knm: {}}", "evaluate.knm"),
        (
            "evaluate: {knn: {arms: [randm]}}",
            "evaluate.knn.arms: 'randm' is no arm; did you mean 'random'?",
        ),
    ],
)  # fmt: skip
def test_a_wrong_study_is_refused_in_one_line(tmp_path: Path, fields: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        load_study(write_study(tmp_path, **yaml.safe_load(fields)))
    assert str(refused.value).startswith(f"study {tmp_path / 'study.yaml'}: {message}")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ("arms: {a: {set: {masking.ratoi: 0.5}}}", "arms.a: masking.ratoi: unknown key; did you mean"),
        ("recipe: digts", "arms.random: --config digts: no such file, and no recipe"),
        (
            "{steps: 4, arms: {a: {}, b: {set: {pretrain.unroll_steps: 9}, against: a}}, budgets: [steps]}",
            "arms.b: 4 steps of its baseline do not buy one outer iteration",
        ),
    ],
)  # fmt: skip
def test_wrong_settings_name_their_arm(tmp_path: Path, fields: str, message: str) -> None:
    with pytest.raises(UserError) as refused:
        plan(tmp_path, **yaml.safe_load(fields))
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read (No such file or directory)"),
        ("arms: [", "not valid YAML"),
        ("- 1", "expected a mapping with the field arms"),
        ("steps: 3", "expected a mapping with the field arms"),
    ],
)
def test_a_file_that_is_no_study(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "study.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as refused:
        load_study(path)
    assert str(refused.value).startswith(f"study {path}: {message}")


@pytest.mark.parametrize(
    "path", sorted((ROOT / "benchmarks" / "studies").glob("*.yaml")), ids=lambda path: path.stem
)
def test_studies_of_the_project_can_be_run(path: Path) -> None:
    study = load_study(path)
    runs = plan_runs(study, Path("runs"))
    assert {run.arm for run in runs} == set(study.arms)
    # The comment at the top names the command.
    assert f"mlomae study {path.relative_to(ROOT)}" in path.read_text()
    for arm in study.arms.values():
        assert arm.against is None or len(study.seeds) >= 3


def test_the_study_of_the_documentation_is_one(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "studies.md").read_text().partition("```yaml\n")[2].partition("```")[0]
    (tmp_path / "study.yaml").write_text(text)
    study = load_study(tmp_path / "study.yaml")
    assert len(plan_runs(study, tmp_path)) == 3 * (1 + 2 + 2 + 1)
    assert study.evaluate["finetune"].words("finetune", tmp_path)[-2:] == ["--optim.epochs", "1"]
