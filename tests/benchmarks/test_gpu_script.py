"""``benchmarks/gpu.py`` without a GPU: what happens to a part that goes wrong, and what a record holds."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu_parts import conductor, plots, profiling, providers
from benchmarks.gpu_parts.catalogue import PARTS, Part, choose, next_wave
from benchmarks.gpu_parts.conductor import Setting, conduct
from benchmarks.gpu_parts.files import markdown, read_json
from benchmarks.gpu_parts.floors import floor, work_row
from benchmarks.gpu_parts.job import READY, RESULT, Job, Order, OutOfTime, Skipped
from benchmarks.gpu_parts.models import MODELS, SMOKE_MODEL, PretrainStep
from benchmarks.gpu_parts.profiling import Kernel
from benchmarks.gpu_parts.record import Record
from mlomae.config import Config
from mlomae.flops import pretrain_flops
from mlomae.models.encoder import SIZES
from tests.architecture.source_tree import ROOT

SCRIPT = [sys.executable, "benchmarks/gpu.py"]
Act = Callable[[Job], None]


# What the parts of these tests do; their processes import this module.
def _measures(job: Job) -> None:
    job.table("t", "a table", [{"what": "x", "ms": 1.5}])
    job.bar("reached", 2.0, ">=", 1.0)


def _half_works(job: Job) -> None:
    with job.attempt("first half"):
        raise ValueError("no luck")
    job.table("t", "a table", [{"what": "second half", "ms": 2.5}])


def _raises(job: Job) -> None:
    raise RuntimeError("broken\nbeyond repair")


def _lacks(job: Job) -> None:
    import no_such_package  # noqa: F401


def _hangs(job: Job) -> None:
    job.table("t", "a table", [{"what": "before", "ms": 3.5}])
    time.sleep(600)


def _dies(job: Job) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def _looks_at_the_clock(job: Job) -> None:
    job.require(1e6, "a long measurement")


ACTS: dict[str, Act] = {
    "measures": _measures, "half-works": _half_works, "raises": _raises, "lacks": _lacks,
    "hangs": _hangs, "dies": _dies, "late": _looks_at_the_clock,
}  # fmt: skip


def run(job: Job) -> Iterator[None]:
    """The part: nothing to prepare."""
    yield
    ACTS[job.argument](job)


def _order(argument: str, smoke: bool = False, seconds: float = 60) -> Order:
    end = time.time() + seconds
    return Order(
        argument, run.__module__, argument, "cpu", smoke, False, until=end, end=end, out="", stamp=""
    )


def _result(folder: Path) -> dict[str, Any]:
    found = read_json(folder / RESULT)
    assert found is not None
    return found


def _run_here(
    argument: str, folder: Path, monkeypatch: pytest.MonkeyPatch, smoke: bool = False, seconds: float = 60
) -> dict[str, Any]:
    """The result of a part that runs in this process and is told at once to measure."""
    monkeypatch.setitem(sys.modules, run.__module__, SimpleNamespace(run=run))
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{time.time() + seconds}\n"))
    Job(_order(argument, smoke), folder).run()
    assert (folder / READY).exists()
    return _result(folder)


@pytest.mark.parametrize(
    ("argument", "status", "reason"),
    [
        ("measures", "done", None),
        ("half-works", "failed", None),
        ("raises", "failed", "RuntimeError: broken beyond repair (test_gpu_script.py:"),
        ("lacks", "skipped", "no_such_package is not installed"),
        ("late", "out of time", "a long measurement: needs about 1000000 s"),
    ],
)
def test_a_part_says_how_it_ended(
    argument: str, status: str, reason: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = _run_here(argument, tmp_path, monkeypatch)
    assert result["status"] == status
    assert (result["reason"] or "").startswith(reason or "")
    assert set(result["seconds"]) == {"prepare", "measure"}


def test_a_failed_piece_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = _run_here("half-works", tmp_path, monkeypatch)
    (failure,) = result["failures"]
    assert failure["what"] == "first half" and failure["error"].startswith("ValueError: no luck")
    assert result["tables"]["t"]["rows"] == [{"what": "second half", "ms": 2.5}]


def test_no_turn_is_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, run.__module__, SimpleNamespace(run=run))
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    Job(_order("measures"), tmp_path).run()
    assert _result(tmp_path)["status"] == "out of time"


def test_a_smoke_run_records_no_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = _run_here("measures", tmp_path, monkeypatch, smoke=True)
    assert result["tables"]["t"]["rows"] == [{"what": "x", "ms": None}]
    (bar,) = result["bars"]
    assert bar["value"] is None and bar["met"] is None


@pytest.mark.parametrize(
    ("value", "relation", "bound", "met"),
    [
        (1.0, ">=", 1.0, True),
        (0.9, ">=", 1.0, False),
        (2.2, "<=", 2.2, True),
        (2.3, "<=", 2.2, False),
        (None, ">=", 1.0, False),
        (float("nan"), "<=", 1.0, False),
    ],
)
def test_bars(value: float | None, relation: str, bound: float, met: bool, tmp_path: Path) -> None:
    Job(_order("bars"), tmp_path).bar("b", value, relation, bound)
    (bar,) = _result(tmp_path)["bars"]
    assert bar["met"] is met


def test_the_clock_and_skips_are_no_failures_of_a_piece(tmp_path: Path) -> None:
    job = Job(_order("pieces", seconds=0), tmp_path)
    with pytest.raises(OutOfTime, match="the rest"), job.attempt("piece"):
        job.require(1, "the rest")
    with pytest.raises(Skipped), job.attempt("piece"):
        raise Skipped("not here")
    assert _result(tmp_path)["failures"] == []


def _setting(folder: Path, seconds: float) -> Setting:
    return Setting(
        device="cpu", smoke=False, quick=False, out=folder, stamp="s", end=time.time() + seconds,
        gigabytes=100, processes=3, scratch=folder,
    )  # fmt: skip


@pytest.mark.slow
def test_processes_that_die_or_hang_leave_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conductor, "GRACE", 0.2)
    names = ("dies", "hangs", "raises", "measures")
    parts = [Part(name, "tests.benchmarks.test_gpu_script", name, 1, 60, 2, name) for name in names]
    path = tmp_path / "record.json"
    record = Record(path, {"smoke": False})
    seen: list[list[str]] = []

    def finished(part: Part, result: conductor.Result) -> None:
        record.add(part, result)
        content = read_json(path)
        assert content is not None
        seen.append(list(content["parts"]))

    conduct(parts, _setting(tmp_path, 200), finished)
    found = record.content["parts"]
    assert {name: found[name]["status"] for name in names} == {
        "dies": "failed", "hangs": "out of time", "raises": "failed", "measures": "done",
    }  # fmt: skip
    assert "SIGSEGV" in found["dies"]["reason"]
    # What was found before is kept, and the log says where it hung.
    assert found["hangs"]["tables"]["t"]["rows"] == [{"what": "before", "ms": 3.5}]
    assert any("_hangs" in line for line in found["hangs"]["log"])
    assert not record.good
    # The file grew by a part at a time.
    assert [len(names) for names in seen] == [1, 2, 3, 4]


def test_nothing_starts_without_time(tmp_path: Path) -> None:
    found: dict[str, str] = {}
    conduct(PARTS, _setting(tmp_path, 1), lambda part, result: found.update({part.name: result["status"]}))
    assert found == {part.name: "not started" for part in PARTS}


def test_waves_fit_the_memory() -> None:
    small, large = PARTS[0], replace(PARTS[1], gigabytes=50)
    other = replace(PARTS[2], gigabytes=40)
    assert next_wave([large, other, small], gigabytes=80, processes=8) == [large, small]
    assert next_wave([large, other, small], gigabytes=100, processes=2) == [large, other]
    assert next_wave([large], gigabytes=10, processes=2) == [large]


def test_parts_are_chosen_by_name_and_group() -> None:
    assert choose(None) == PARTS
    assert [part.name for part in choose("attention,steps")] == [
        "steps-l16", "steps-b16", "steps-h14", "attention",
    ]  # fmt: skip
    with pytest.raises(ValueError, match="no part 'nonsense'"):
        choose("nonsense")


def test_a_record_is_good_when_parts_and_bars_are() -> None:
    record = Record(None, {"smoke": False})
    empty = conductor.empty_result
    record.add(PARTS[0], {**empty("done", ""), "bars": [{"met": True}, {"met": None}]})
    record.add(PARTS[1], empty("skipped", "yaml is not installed"))
    assert record.good
    record.content["bars"].append({"met": False})
    assert not record.good
    record.content["bars"].pop()
    record.add(PARTS[2], empty("out of time", "still measuring"))
    assert not record.good


def test_markdown() -> None:
    rows = [{"a": "x", "b": 1234.5, "c": None}, {"a": "longer", "b": 0.12345, "c": True}]
    assert markdown(rows).splitlines() == [
        "| a      | b      | c   |",
        "| ------ | ------ | --- |",
        "| x      | 1,234  |     |",
        "| longer | 0.1235 | yes |",
    ]


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_floors(model: Any) -> None:
    assert SIZES[model.arch] == (model.width, model.depth, model.heads)
    work = floor(model)
    assert work.flops == model.batch * pretrain_flops(Config.model_validate({"model": model.fields()}))
    # AdamW: four numbers read and three written; at 1 byte/s and unlimited arithmetic that is all.
    assert work.milliseconds(1e30, 1.0)["byte floor of AdamW, ms"] == 1e3 * 28 * work.weights
    least = work.milliseconds(1e15, 3e12)
    assert least["floor, ms"] == pytest.approx(least["FLOP floor, ms"] + least["byte floor of AdamW, ms"])
    assert work_row(work)["TFLOP/step"] == pytest.approx(work.flops / 1e12)


def test_a_step_learns() -> None:
    torch.manual_seed(0)
    step = PretrainStep(SMOKE_MODEL, torch.device("cpu"), smoke=True)
    for fused in (False, True):
        step.optimise(fused)
        before = float(step.loss().detach())
        for _ in range(5):
            step.once()
        assert float(step.loss().detach()) < before


def test_the_kernels_that_know_the_removed_by_position_count_their_bytes() -> None:
    shape = providers.SMOKE["smoke"]
    rows, loss = providers.all_calls(shape, torch.float32, "cpu")[-2:]
    removed = shape.batch * (shape.patches - shape.num_keep)
    assert rows.forward_bytes == 2 * removed * shape.width * 4
    assert rows.backward_bytes == (removed + shape.batch * shape.patches) * shape.width * 4
    numbers = 3 * shape.patch_size**2
    # Predictions and pixels, a position of 8 bytes, an error of 4.
    assert loss.forward_bytes == removed * (numbers * (4 + 4) + 8 + 4)


def test_wrong_results_show() -> None:
    call = providers.all_calls(providers.SMOKE["smoke"], torch.float32, "cpu")[1]
    expected = providers.expectation(call)
    assert providers.distance(call, "eager", call.reference, expected) <= 1

    def wrong(*inputs: Any) -> torch.Tensor:
        return call.reference(*inputs) * 1.001

    def broken(*inputs: Any) -> torch.Tensor:
        return call.reference(*inputs) * torch.nan

    assert providers.distance(call, "eager", wrong, expected) > 1
    assert not providers.distance(call, "eager", broken, expected) <= 1


def test_time_by_kind() -> None:
    kernels = [
        Kernel("nvjet_tst_128x256", "kernel", 0.0, 100.0),
        Kernel("pytorch_flash::flash_fwd_kernel<cutlass::bfloat16_t>", "kernel", 50.0, 100.0),
        Kernel("multi_tensor_apply_kernel<FusedAdamMathFunctor>", "kernel", 200.0, 40.0),
        Kernel("triton_red_fused_native_layer_norm_3", "kernel", 240.0, 10.0),
        Kernel("_patch_gather_kernel", "kernel", 250.0, 50.0),
        Kernel("Memcpy DtoD (Device -> Device)", "gpu_memcpy", 380.0, 20.0),
    ]
    rows = {row["kind"]: row for row in profiling.by_kind(kernels, steps=2)}
    assert rows["products"]["ms per step"] == pytest.approx(0.05)
    assert set(rows) == {
        "products", "attention", "optimizer", "normalisation, GELU, elementwise", "patch operators", "copies",
        "idle",
    }  # fmt: skip
    # Of 400 microseconds, 50 before the optimizer and 80 before the copy had nothing to do.
    assert rows["idle"]["share of the time"] == pytest.approx(130 / 400)
    first = profiling.longest(kernels, steps=2)[0]
    assert first["us each"] == pytest.approx(100.0) and first["share"] == pytest.approx(100 / 320)


def test_pictures_are_drawn_of_what_there_is(tmp_path: Path) -> None:
    row = {
        "model": "ViT-B/16", "variant": "compiled", "forward, ms": 10.0, "backward, ms": 20.0,
        "optimizer, ms": 1.0, "floor, ms": 25.0, "MFU, measured peak": 0.5, "MFU, data sheet": None,
    }  # fmt: skip
    record = {
        "date": "2026-01-01T00:00:00",
        "machine": {"device": "a GPU"},
        "parts": {"steps-b16": {"tables": {"steps": {"rows": [row]}}}},
    }
    assert plots.draw(record, tmp_path, "now") == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["now_mfu.png", "now_steps.png"]


@pytest.mark.slow
def test_floor_needs_no_gpu() -> None:
    done = subprocess.run([*SCRIPT, "--floor"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ViT-H/14" in done.stdout and "arithmetic, not measured" in done.stdout


@pytest.mark.slow
def test_smoke_runs_every_part_and_times_nothing(tmp_path: Path) -> None:
    command = [*SCRIPT, "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every provider agrees with plain PyTorch" in done.stdout
    assert "nothing was timed" in done.stdout
    (path,) = tmp_path.glob("*/*_gpu.json")
    record = json.loads(path.read_text())
    assert record["smoke"] and record["git"] and torch.__version__.startswith(record["versions"]["torch"])
    assert {part.module for part in PARTS} == {part.module for part in PARTS if part.name in record["parts"]}
    assert {part["status"] for part in record["parts"].values()} <= {"done", "skipped"}
    figures = [
        cell
        for part in record["parts"].values()
        for table in part["tables"].values()
        for row in table["rows"]
        for cell in row.values()
    ]
    assert figures and not any(isinstance(cell, float) for cell in figures)
    assert {bar["what"] for bar in record["bars"] if bar["met"] is not None} == {
        "kernels not shown to agree with plain PyTorch", "smoke: compiled gradient off from eager",
    }  # fmt: skip


@pytest.mark.slow
def test_what_there_is_survives_the_end(tmp_path: Path) -> None:
    command = [*SCRIPT, "--smoke", "--processes", "1", "--only", "ceilings,attention", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("## ceilings"):
            process.terminate()
            break
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "SOMETHING FAILED" in rest
    (path,) = tmp_path.glob("*/*_gpu.json")
    assert json.loads(path.read_text())["parts"]["ceilings"]["status"] == "done"


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run(SCRIPT, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "found no CUDA device" in done.stderr
