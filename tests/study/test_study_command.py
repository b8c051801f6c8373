"""``mlomae study`` as a user starts it: real runs, what is skipped, what fails, and the way to Slurm."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mlomae.cli import main
from mlomae.config import dump_config
from mlomae.errors import Preempted
from mlomae.report.reading import read_runs
from mlomae.study import actions, schedule
from mlomae.study.plan import load_study, plan_runs
from mlomae.study.results import curves
from mlomae.study.schedule import Scheduler, commands
from tests.architecture.source_tree import ROOT
from tests.study.made import ARMS, results, write_study

CONTINUED = {"start_from": "random", "against": "random", "budgets": ["steps"]}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished study: two arms, one that starts from another, one that cannot work, an evaluation."""
    folder = tmp_path_factory.mktemp("study")
    # Nothing is finite at such a rate.
    broken = {"set": {"masking.policy": "random", "pretrain.lr": 1e30}, "against": "random"}
    after_it = {"start_from": "broken", "against": "random"}
    learned = {"against": "random"}
    arms = {"random": ARMS["random"], "learned": learned, "continued": CONTINUED}
    arms |= {"broken": broken, "after-it": after_it}
    evaluate = {"knn": {"set": {"ks": [1, 3]}}}
    study = write_study(folder, arms=arms, budgets=["steps"], evaluate=evaluate)
    words = ["study", str(study), "--out", str(folder / "out"), "--jobs", "2"]
    found = subprocess.run(
        [sys.executable, "-m", "mlomae", *words], cwd=ROOT, capture_output=True, text=True, timeout=500
    )
    assert found.returncode == 1, found.stdout + found.stderr
    (folder / "printed").write_text(found.stdout)
    return folder


@pytest.mark.slow
def test_every_run_is_trained_evaluated_and_told(done: Path) -> None:
    told = json.loads((done / "out" / "results.json").read_text())
    assert told["planned"] == 5
    rows = {(row["arm"], *row["budgets"]): row for row in told["runs"]}
    assert set(rows) == {("random", "steps", "flops"), ("learned", "steps"), ("continued", "steps")}
    for row in rows.values():
        run = done / "out" / "runs" / f"{row['arm']}/{row['iterations']}-seed0"
        evaluated = json.loads(next(run.glob("eval/knn-*/result.json")).read_text())
        # In place of the figure of the same name at the end of the run, which asks other neighbours.
        assert row["figures"]["knn_accuracy"] == evaluated["accuracy"]
        assert 0 < row["figures"]["linear_accuracy"] <= 1
        assert row["curves"]["mask/agreement"][0][-1] == row["iterations"]
    assert rows["learned", "steps"]["iterations"] == 4
    page = (done / "out" / "report.md").read_text()
    assert "3 of 5 runs" in page and page.count("| learned |") == 1
    for name in ("differences.svg", "masks.svg", "gallery.png"):
        assert f"({name})" in page and (done / "out" / name).stat().st_size > 5000


@pytest.mark.slow
def test_what_fails_is_named_with_its_reason_and_stops_nothing_else(done: Path) -> None:
    printed = (done / "printed").read_text()
    assert "broken/4-seed0: failed: train ended with 2: " in printed and "not finite" in printed
    assert "after-it/4-seed0: starts from" in printed
    assert not list((done / "out" / "runs" / "after-it").glob("*/config.yaml"))


@pytest.mark.slow
def test_encoders_are_started_from_the_run_of_the_same_seed(done: Path) -> None:
    config = yaml.safe_load((done / "out/runs/continued/4-seed0/config.yaml").read_text())
    assert Path(config["model"]["weights"]) == done / "out/runs/random/4-seed0"


@pytest.mark.slow
def test_what_is_done_has_no_command_left(done: Path) -> None:
    study = load_study(done / "study.yaml")
    left = {
        run.arm: list(commands(study, run))
        for run in plan_runs(study, done / "out" / "runs")
        if run.arm != "after-it"
    }
    assert left.pop("broken")[0][0] == "train"
    assert not any(left.values())


@pytest.mark.slow
def test_results_stand_for_folders_that_are_gone(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = (done / "out" / "results.json").read_text()
    (tmp_path / "results.json").write_text(told)
    # Without the arms that failed; one more would be trained.
    tree = yaml.safe_load((done / "study.yaml").read_text())
    tree["arms"] = {name: arm for name, arm in tree["arms"].items() if name in ("random", "learned")}
    study = tmp_path / "study.yaml"
    study.write_text(yaml.safe_dump(tree))
    assert main(["study", str(study), "--out", str(tmp_path)]) == 0
    assert "2 of 2 runs" in capsys.readouterr().out and not (tmp_path / "runs").exists()
    old, new = (
        {row["arm"]: row for row in json.loads(text)["runs"]}
        for text in (told, (tmp_path / "results.json").read_text())
    )
    assert new == {name: old[name] for name in ("random", "learned")}


@pytest.mark.slow
def test_a_changed_study_does_not_pass_off_old_runs_as_its_own(
    done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path, arms={"random": ARMS["random"]}, set={"pretrain.lr": 1e-5})
    out = tmp_path / "out"
    (out / "runs").mkdir(parents=True)
    (out / "runs" / "random").symlink_to(done / "out" / "runs" / "random")
    assert main(["study", str(study), "--out", str(out)]) == 1
    assert "holds a different run (pretrain.lr is " in capsys.readouterr().out
    # Nor does the next call believe them.
    assert not (out / "results.json").exists()
    assert main(["study", str(study), "--out", str(out)]) == 1
    assert main(["study", str(study), "--out", str(out), "--dry-run"]) == 0
    assert "trained" not in capsys.readouterr().out


@pytest.mark.slow
def test_a_study_that_is_stopped_saves_and_goes_on(tmp_path: Path) -> None:
    arms = {"random": {"set": {"masking.policy": "random"}}}
    study = write_study(tmp_path, arms=arms, steps=100_000, set={"checkpoint_every": 10})
    words = ["study", str(study), "--out", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-m", "mlomae", *words], cwd=ROOT, stderr=subprocess.PIPE)
    run = tmp_path / "out/runs/random/50000-seed0"
    while not list(run.glob("checkpoints/step-*/manifest.json")):
        assert process.poll() is None
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=120)

    assert process.returncode == 75, errors
    assert "Traceback" not in errors.decode()
    # The training had ended, with a checkpoint of its own out of schedule.
    assert "stopped by SIGTERM after iteration" in run.with_name(f"{run.name}.log").read_text()


def test_runs_are_spread_over_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Process:
        def __init__(self, words: list[str], env: dict[str, str], **_: object) -> None:
            seen.append((env.get("CUDA_VISIBLE_DEVICES"), env["OMP_NUM_THREADS"]))

        def wait(self) -> int:
            time.sleep(0.05)
            return 0

    monkeypatch.setattr(schedule.subprocess, "Popen", Process)
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    study = load_study(write_study(tmp_path, seeds=[0, 1, 2, 3], arms={"random": ARMS["random"]}))
    assert Scheduler(study, 2, ["3", "5"], lambda _: None).run(plan_runs(study, tmp_path)) == {}
    assert {gpu for gpu, _ in seen} == {"3", "5"} and {threads for _, threads in seen} == {"4"}


def test_a_signal_stops_what_runs_and_starts_nothing_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, stopped = [], []

    class Process:
        def __init__(self, words: list[str], **_: object) -> None:
            started.append(self)

        def wait(self) -> int:
            while self not in stopped:
                time.sleep(0.01)
            return 75

        def send_signal(self, number: int) -> None:
            stopped.append(self)

    def tell(line: str) -> None:
        raise AssertionError(line)

    monkeypatch.setattr(schedule.subprocess, "Popen", Process)
    study = load_study(write_study(tmp_path, seeds=[0, 1, 2], arms={"random": ARMS["random"]}))
    scheduler = Scheduler(study, 1, [], lambda _: None)
    runs = plan_runs(study, tmp_path)

    def interrupt(*_: object) -> None:
        raise Preempted("stopped by SIGALRM")

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(Preempted):
            scheduler.run(runs)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert len(started) == 1 and stopped == started


def test_dry_run_lists_the_runs_and_what_they_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = write_study(tmp_path, seeds=[0, 1])
    assert main(["study", str(study), "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and total.startswith("6 runs, ")
    assert lines[0].startswith("random/4-seed0") and "steps,flops" in lines[0]
    assert not (tmp_path / "out").exists()


def test_report_of_a_results_file_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "results.json").write_text(results({"random": [0.4, 0.5], "learned": [0.5, 0.61]}).dump())
    assert main(["study", str(tmp_path / "results.json"), "--out", str(tmp_path / "again")]) == 0
    assert {path.name for path in (tmp_path / "again").iterdir()} == {
        "report.md",
        "differences.svg",
        "masks.svg",
    }
    assert "+10.50" in (tmp_path / "again" / "report.md").read_text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no results of a study"),
        ('{"format": 9}', "no results of a study"),
        ('{"format": 1, "runs": []}', "damaged ('study')"),
        ('{"format": 1, "study": {"arms": 3}, "planned": 1, "machine": {}, "runs": []}', "study.arms: "),
    ],
)
def test_a_file_that_holds_no_results(
    tmp_path: Path, text: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    assert main(["study", str(path)]) == 2
    assert f"results {path}: {message}" in capsys.readouterr().err


def test_what_is_left_becomes_a_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = write_study(tmp_path, seeds=[0, 1], arms={**ARMS, "continued": CONTINUED})
    out = tmp_path / "out"
    (random,) = (run for run in plan_runs(load_study(study), out / "runs") if run.name == "random/4-seed0")
    finished = random.path
    finished.mkdir(parents=True)
    (finished / "config.yaml").write_text(dump_config(random.config))
    (finished / "result.json").write_text("{}")
    words = ["study", str(study), "--out", str(out), "--slurm", "--gpus-per-node", "1", "--time", "1:00:00"]
    assert main([*words, "--dry-run"]) == 0

    printed = capsys.readouterr().out
    (sweep,) = out.glob("sweep-*.txt")
    lines = sweep.read_text().splitlines()
    # Both budgets of learned, and what starts from the finished run; not what waits for the other.
    assert len(lines) == 6 and f"--array 1-{len(lines)}" in printed and "--time 1:00:00" in printed
    assert not any(str(finished) in line and "weights" not in line for line in lines)
    assert "continued/4-seed1: waits for" in printed
    assert any("--model.weights" in line for line in lines)
    # Tasks read their line again when they are requeued: what is submitted later has a file of its own.
    (finished / "result.json").unlink()
    assert main([*words, "--dry-run"]) == 0
    assert sweep.read_text().splitlines() == lines and len(list(out.glob("sweep-*.txt"))) == 2


@pytest.mark.parametrize(
    ("options", "on_gpus"), [(["--gpus-per-node", "1"], True), ([], True), (["--gpus-per-node=0"], False)]
)
def test_a_study_stays_planned_for_the_machine_that_it_was_first_planned_for(
    options: list[str], on_gpus: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A login node without GPUs plans for those of the job; a later call anywhere finds the same runs."""
    study, out = write_study(tmp_path), tmp_path / "out"
    assert main(["study", str(study), "--out", str(out), "--slurm", "--dry-run", *options]) == 0
    assert json.loads((out / "planned.json").read_text()) == {"on_gpus": on_gpus}
    assert actions.open_study(study, out).on_gpus is on_gpus
    assert not actions.open_study(study, tmp_path / "other").on_gpus or torch.cuda.is_available()


def test_an_unknown_option_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["study", str(write_study(tmp_path)), "--job", "2"]) == 2
    assert "did you mean '--jobs'?" in capsys.readouterr().err


def test_curves_of_long_runs_are_taken_at_the_same_steps(tmp_path: Path) -> None:
    found = []
    for seed in range(2):
        rng = np.random.default_rng(seed)
        lines = [{"step": 10 * n, "mask/agreement": float(rng.random())} for n in range(1, 1001)]
        run = tmp_path / str(seed)
        run.mkdir()
        (run / "config.yaml").write_text("masking: {policy: random}\n")
        (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
        (told,) = read_runs([run])
        found.append(curves(told)["mask/agreement"])
    (steps, values), (others, _) = found
    assert steps == others and (steps[0], steps[-1]) == (10, 10_000) and len(steps) == len(values) == 40
