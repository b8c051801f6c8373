"""``mlomae profile``: what it measures on recipes and runs, how it reads a trace, and what it refuses."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from mlomae import profiling
from mlomae.cli import main
from mlomae.distributed.env import World
from mlomae.flops import iteration_flops
from mlomae.profile_plot import draw
from mlomae.profile_times import (
    IDLE,
    OperatorTime,
    kind_times,
    operator_times,
    part_flops,
    part_times,
)
from mlomae.profile_trace import BETWEEN, KINDS, OTHER, PARTS, REST, Reading, kind_of, read_trace
from mlomae.profile_view import show, values
from mlomae.profiling import Profile
from mlomae.ranges import PREFIX, profiled
from tests.integration.tiny import tiny_config, train, without_pictures, write_recipe

RANGES = {PREFIX + name for name in (*PARTS, "pretrain/backward")}
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    # Every second iteration has a hypergradient. A recipe does not touch the run directory that it names.
    fields = {"run_dir": str(tmp_path / "untouched"), "hypergradient.every": 2}
    return write_recipe(tmp_path / "tiny.yaml", fields)


@pytest.fixture
def profile(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Command:
    """Runs the command, without its second of measuring speed: exit code, output, messages."""
    monkeypatch.setattr(profiling, "MIN_SECONDS", 1e-3)

    def run(*words: object) -> tuple[int, str, str]:
        code = main(["profile", *map(str, words)])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def ranges_of(trace: Path) -> set[str]:
    text = gzip.decompress(trace.read_bytes()) if trace.suffix == ".gz" else trace.read_bytes()
    events = json.loads(text)["traceEvents"]
    return {event["name"] for event in events if event["name"].startswith(PREFIX)}


def test_json_of_a_recipe(
    recipe: Path, profile: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = profile("--config", recipe, "--json")

    assert (code, err) == (0, "trace: profile.json.gz\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["profile.json.gz", "tiny.yaml"]
    assert ranges_of(tmp_path / "profile.json.gz") == RANGES
    found: dict[str, Any] = json.loads(out)
    assert (found["first_iteration"], found["iterations"], found["hypergradients"]) == (0, 2, 1)
    parts = found["parts"]
    assert [row["part"] for row in parts] == list(dict.fromkeys(PARTS.values()))
    assert all(row["host_seconds"] > 0 and row["device_seconds"] is None for row in parts)
    whole = sum(row["host_seconds"] for row in parts)
    assert found["profiled_seconds"] / 2 < whole <= found["profiled_seconds"]
    for rows, seconds in ((parts, "host_seconds"), (found["kinds"], "seconds")):
        assert sum(row[seconds] for row in rows) == pytest.approx(whole)
        assert sum(row["share"] for row in rows) == pytest.approx(1)
    # No matrix product of this recipe is compiled, and everything else that there is occurs.
    assert [row["kind"] for row in found["kinds"]] == [kind for kind in KINDS if kind != "generated code"]
    operators = found["operators"]
    assert len(operators) == profiling.NUM_OPERATORS
    assert [row["seconds"] for row in operators] == sorted(
        (row["seconds"] for row in operators), reverse=True
    )
    assert all(row["kind"] in KINDS[:-1] and row["calls"] > 0 for row in operators)
    assert found["seconds"] > 0 and found["peak_flops_per_second"] > 0
    assert {"images_per_second", "mfu", "data_wait", "memory/peak_bytes"} <= found["figures"].keys()
    images = tiny_config({}).pretrain.batch_size * 2
    assert found["figures"]["images_per_second"] == pytest.approx(images / found["seconds"])


def test_tables_and_timeline_of_a_run_that_stays_as_it_is(
    profile: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_pictures(monkeypatch)
    run_dir = tmp_path / "run"
    train(tiny_config({"run_dir": run_dir, "iterations": 3, "hypergradient.every": 2}))
    kept = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    (run_dir / "profile.json.gz").write_text("an earlier one")

    code, out, err = profile(run_dir, "--plot", tmp_path / "timeline.png")

    assert (code, err) == (0, "")
    # Iteration 2 is the last one with a hypergradient.
    assert "iterations 2 to 3 on CPU, 1 with a hypergradient" in out
    assert all(name in out for name in (*PARTS.values(), "whole", "matrix products", "aten::"))
    assert "without the profiler: " in out and "waiting for data" in out and "MFU" in out
    assert out.splitlines()[-2:] == [
        f"trace: {run_dir / 'profile.json.gz'}",
        f"plot: {tmp_path / 'timeline.png'}",
    ]
    with Image.open(tmp_path / "timeline.png") as picture:
        assert picture.width > 800
    assert ranges_of(run_dir / "profile.json.gz") == RANGES
    assert {path for path in run_dir.rglob("*") if path.is_file()} - kept.keys() == {
        run_dir / "profile.json.gz"
    }
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_policies_without_a_mask_level_have_fewer_parts(
    recipe: Path, profile: Command, tmp_path: Path
) -> None:
    trace = tmp_path / "t.json"
    words = ["--masking.policy", "random", "--iterations", "3", "--pretrain.micro_batches", "2"]
    code, out, _ = profile("--config", recipe, "--json", "--trace", trace, "--deepspeed_config", "no", *words)

    assert code == 0
    found = json.loads(out)
    assert (found["iterations"], found["hypergradients"]) == (3, 0)
    pretrain = ["data", "mask selection", "pretrain forward", "pretrain backward", "pretrain optimizer", REST]
    assert [row["part"] for row in found["parts"]] == pretrain
    # Three iterations of two steps of two micro-batches; --iterations is not the length of the run here.
    events = json.loads(trace.read_bytes())["traceEvents"]
    names = [event["name"].removeprefix(PREFIX) for event in events]
    assert [names.count(f"pretrain/{name}") for name in ("forward", "backward", "descend")] == [12, 12, 6]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "profile: give a run directory or --config FILE"),
        (["nowhere", "--config", "RECIPE"], "profile: give a run directory or --config FILE"),
        (["nowhere"], "--config nowhere/config.yaml: cannot be read (No such file or directory)"),
        (["--config", "absent.yaml"], "--config absent.yaml: cannot be read"),
        (["--config", "RECIPE", "--iterations", "0"], "found '0', expected a whole number above 0"),
        (["--config", "RECIPE", "--iterations", "-3"], "found '-3', expected a whole number above 0"),
        (["--config", "RECIPE", "--trace", "/nowhere/x.gz"], "--trace /nowhere/x.gz: cannot be written (No"),
        (["--config", "RECIPE", "--trace", "/"], "--trace /: is a folder, expected the name of a file"),
        (["--config", "RECIPE", "--plot", "/nowhere/x.png"], "--plot /nowhere/x.png: cannot be written"),
        (["--config", "RECIPE", "--deepspeed_config", "d.json"], "--deepspeed_config d.json: profile runs"),
        (["--config", "RECIPE", "--model.in_chans", "3"], "model.in_chans: found 3, but digits has 1"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    words: list[str],
    message: str,
    recipe: Path,
    profile: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = profile(*(str(recipe) if word == "RECIPE" else word for word in words))
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1 and message in err
    assert list(tmp_path.iterdir()) == [recipe]


def test_several_processes_are_refused(
    recipe: Path, profile: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "join_world", lambda device: World(0, 2, torch.device("cpu")))
    code, _, err = profile("--config", recipe, "--trace", tmp_path / "t.json")
    assert code == 2
    assert "profile: found 2 processes, expected one" in err


def test_flops_are_those_of_the_iterations_that_are_profiled() -> None:
    for every, due in ((1, 1.0), (4, 0.25)):
        config = tiny_config({"hypergradient.every": every})
        parts = part_flops(config, 10, "fd", due)
        assert sum(parts.values()) == pytest.approx(sum(iteration_flops(config, 10, "fd").values()))
        assert parts["pretrain backward"] < 2 * parts["pretrain forward"]  # no gradient of the images
    never = part_flops(config, 10, "fd", 0.0)
    assert {part for part, flops in never.items() if not flops} == {"direction", "influence", "mask step"}
    for fields in ({"masking.policy": "random"}, {"masking.policy": "hard", "pretrain.label_weight": 0.5}):
        plain = tiny_config(fields)
        assert sum(part_flops(plain, 10, None, 0.0).values()) == sum(iteration_flops(plain, 10).values())


def test_a_range_is_nothing_while_nobody_profiles() -> None:
    assert profiled("a") is profiled("b")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler, profiled("a"):
        pass
    assert "mlomae/a" in [event.key for event in profiler.key_averages()]


def event(name: str, start: float, end: float, cat: str = "cpu_op", tid: int = 1, **args: int) -> Any:
    """An event of a trace, in us."""
    where = {"pid": 1, "tid": tid, "args": args}
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": end - start, **where}


def part(name: str, start: float, end: float) -> Any:
    return event(PREFIX + name, start, end, "user_annotation")


HOST = [
    event("aten::before", 0, 5),
    part("iteration", 10, 110),
    part("pretrain/descend", 20, 80),
    part("pretrain/backward", 20, 60),
    event("autograd::engine::evaluate_function: AddmmBackward0", 20, 50),
    event("AddmmBackward0", 21, 49),
    event("aten::mm", 22, 42),
    event("aten::sum", 42, 47),
    # Begins in the ns in which the one before ends.
    event("Optimizer.step#AdamW.step", 59.999, 80, "user_annotation"),
    event("aten::_fused_adamw_", 62, 70),
    event("aten::copy_", 63, 65),
    event("aten::elsewhere", 30, 40, tid=2),
    part("mask/step", 80, 90),
    part("something/new", 90, 95),
]


def test_time_on_the_host_is_counted_once() -> None:
    reading = read_trace({"traceEvents": [*reversed(HOST), {"ph": "M", "name": "process_name"}]})

    assert reading.host_time == 100_000
    parts = {row.part: round(1e6 * (row.host_seconds or 0)) for row in part_times(reading, {}, False)}
    assert parts == {"pretrain backward": 40, "pretrain optimizer": 20, "mask step": 10, REST: 30}
    kinds = {row.kind: round(1e6 * row.seconds) for row in kind_times(reading, False)}
    # What the optimizer calls is the optimizer's, what a backward node calls is not the node's.
    assert kinds == {"matrix products": 20, "optimizer": 20, OTHER: 5, BETWEEN: 55}
    first, *rest = operator_times(reading, False)
    assert first == OperatorTime("aten::mm", "matrix products", 1, pytest.approx(2e-5), pytest.approx(0.2))
    assert {row.operator for row in rest} == {
        "aten::sum", "Optimizer.step#AdamW.step", "aten::_fused_adamw_", "aten::copy_"
    }  # fmt: skip
    assert [reading.part_at(1000 * time) for time in (5, 15, 30, 70, 85, 109, 120)] == [
        None, REST, "pretrain backward", "pretrain optimizer", "mask step", REST, None
    ]  # fmt: skip


def test_a_trace_without_iterations_is_an_error() -> None:
    with pytest.raises(ValueError, match="found no range mlomae/iteration"):
        read_trace({"traceEvents": HOST[:1]})


def gpu_reading() -> Reading:
    """The same host, a GPU that is later than the host, and a copy beside the first kernel."""
    launches = [
        event("cudaMemcpyAsync", 12, 13, "cuda_runtime", correlation=1),
        # By the thread of autograd.
        event("cudaLaunchKernel", 25, 26, "cuda_runtime", tid=2, correlation=2),
        event("cuLaunchKernelEx", 66, 67, "cuda_driver", correlation=3),
        event("cudaLaunchKernel", 6, 7, "cuda_runtime", correlation=4),
    ]
    running = [
        event("earlier", 8, 20, "kernel", tid=7, stream=7, correlation=4),
        event("nvjet_tst_128x256_64x4_1x2_h_bz_coopA_TNT", 40, 90, "kernel", tid=7, stream=7, correlation=2),
        event("Memcpy HtoD (Pinned -> Device)", 50, 95, "gpu_memcpy", tid=9, stream=9, correlation=1),
        event(
            "void multi_tensor_apply_kernel<FusedAdam>", 100, 130, "kernel", tid=7, stream=7, correlation=3
        ),
    ]
    return read_trace({"traceEvents": [*HOST, *launches, *running]})


def test_time_on_a_gpu_belongs_to_the_part_that_launched_it() -> None:
    reading = gpu_reading()

    assert reading.device_time == 120_000
    rows = part_times(reading, {"pretrain backward": 1e9}, on_gpu=True)
    device = {row.part: round(1e6 * (row.device_seconds or 0)) for row in rows}
    # The copy counts where it is alone.
    assert device == {
        "pretrain backward": 50, "pretrain optimizer": 30, "mask step": 0, REST: 5, IDLE: 35
    }  # fmt: skip
    assert sum(row.share for row in rows) == pytest.approx(1)
    assert sum(row.host_seconds or 0 for row in rows) == pytest.approx(1e-4)
    assert rows[0].flops_per_second == pytest.approx(1e9 / 5e-5)
    assert rows[1].flops_per_second is None
    kinds = {row.kind: round(1e6 * row.seconds) for row in kind_times(reading, on_gpu=True)}
    assert kinds == {"matrix products": 50, "optimizer": 30, "copies": 5, IDLE: 35}
    assert [row.calls for row in operator_times(reading, on_gpu=True)] == [1, 1, 1]


def test_tables_and_timeline_of_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    reading = gpu_reading()
    result = Profile(
        parts=part_times(reading, {}, on_gpu=True),
        kinds=kind_times(reading, on_gpu=True),
        operators=operator_times(reading, on_gpu=True),
        seconds=1e-4, profiled_seconds=1.2e-4, figures={"images_per_second": 1e4, "data_wait": 0.01},
        peak_flops=None, first=0, iterations=1, due=1, device="NVIDIA H100 80GB HBM3",
        implementations="operators: triton", reading=reading, trace=b"",
    )  # fmt: skip
    show(result)
    shown = capsys.readouterr().out
    assert "device ms" in shown and "host ms" in shown and IDLE in shown
    assert "multi_tensor_apply_kernel<FusedAdam>" in shown and "void" not in shown
    assert "+20%" in shown and "MFU" not in shown
    assert json.loads(json.dumps(values(result)))["parts"][-1]["host_seconds"] is None
    (tmp_path / "timeline.png").write_bytes(draw(result))
    # Two lanes of the host and three of the GPU above, two and three enlarged.
    with Image.open(tmp_path / "timeline.png") as picture:
        high = picture.height
    (tmp_path / "host.png").write_bytes(draw(replace(result, reading=replace(reading, device=[]))))
    with Image.open(tmp_path / "host.png") as picture:
        assert picture.height < high


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        (
            "matrix products",
            "aten::mm; aten::addmm; aten::linear; aten::convolution_backward; mkldnn::_linear_pointwise; "
            "sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x64x32; triton_tem_fused_addmm_2; "
            "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>; "
            "void cublasLt::splitKreduce_kernel<32>",
        ),
        (
            "attention",
            "aten::_scaled_dot_product_flash_attention_for_cpu; void pytorch_flash::flash_fwd_kernel<T>; "
            "fmha_cutlassF_bf16_aligned_64x64_rf_sm80; aten::_softmax; "
            "cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16_knob_26_64x128x64",
        ),
        (
            "normalisation",
            "aten::native_layer_norm_backward; triton_per_fused_add_native_layer_norm_3; "
            "void at::native::(anonymous namespace)::GammaBetaBackwardCUDAKernelTemplate<float>; "
            "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>",
        ),
        (
            "activation",
            "aten::gelu_backward; aten::tanh; triton_poi_fused_gelu_5; "
            "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl>",
        ),
        (
            "patch operators",
            "mlomae::patch_gather; mlomae_native::masked_patch_loss; _patch_scatter_backward_kernel; "
            "_masked_patch_loss_kernel; _select_patches_kernel; "
            "void mlomae::cuda::(anonymous namespace)::gather_kernel<float>",
        ),
        ("generated code", "## Call CompiledFxGraph f0 ##; triton_poi_fused_add_7; triton_red_fused_sum_1"),
        (
            "optimizer",
            "Optimizer.zero_grad#AdamW.zero_grad; aten::_fused_adamw_; aten::_foreach_norm; "
            "void at::native::(anonymous namespace)::multi_tensor_apply_kernel<FusedAdamMathFunctor>",
        ),
        (
            "copies",
            "aten::copy_; aten::_to_copy; aten::cat; aten::index; aten::zeros; Memset (Device); "
            "Memcpy DtoD (Device -> Device); "
            "void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda>; "
            "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>>",
        ),
        (
            OTHER,
            "aten::add; aten::_log_softmax; aten::linalg_vector_norm; aten::sort; "
            "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
        ),
        (
            BETWEEN,
            "autograd::engine::evaluate_function: NativeLayerNormBackward0; GeluBackward0; _GatherBackward; "
            "torch::autograd::AccumulateGrad; Torch-Compiled Region: 0/0; ProfilerStep#1",
        ),
    ],
)
def test_kinds_by_name(kind: str, names: str) -> None:
    assert {name: kind_of(name) for name in names.split("; ")} == dict.fromkeys(names.split("; "), kind)


def test_what_an_operation_calls_is_part_of_it_except_in_products() -> None:
    assert kind_of("aten::copy_", "attention") == "attention"
    assert kind_of("aten::copy_", "matrix products") == "copies"
    assert kind_of("aten::view", "matrix products") == "matrix products"
