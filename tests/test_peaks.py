"""What devices can do: the table of data sheets, and the measurement."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import torch

from mlomae import peaks
from mlomae.peaks import data_sheet_peak, measured_peak, peaks_of

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _measure_again() -> Iterator[None]:
    peaks._measure.cache_clear()
    yield
    peaks._measure.cache_clear()


@pytest.mark.parametrize(
    ("name", "bf16", "tf32", "float32"),
    [
        ("Tesla V100-SXM2-32GB", None, None, 15.7),
        ("Tesla V100-PCIE-16GB", None, None, 14.0),
        ("Tesla T4", None, None, 8.1),
        ("A100-SXM4-40GB", 312, 156, 19.5),
        ("NVIDIA A100-SXM4-80GB", 312, 156, 19.5),
        ("NVIDIA A100 80GB PCIe", 312, 156, 19.5),
        ("NVIDIA A10", 125, 62.5, 31.2),
        ("NVIDIA A30", 165, 82, 10.3),
        ("NVIDIA A40", 149.7, 74.8, 37.4),
        ("NVIDIA L4", 121, 60, 30.3),
        ("NVIDIA L40", 181.05, 90.5, 90.5),
        ("NVIDIA L40S", 362.05, 183, 91.6),
        ("NVIDIA H100 80GB HBM3", 989.4, 494.7, 66.9),
        ("NVIDIA H100 PCIe", 756.5, 378, 51.2),
        ("NVIDIA H100 NVL", 835.5, 417.5, 60),
        ("NVIDIA H200", 989.4, 494.7, 66.9),
        ("NVIDIA H200 NVL", 835.5, 417.5, 60),
        ("NVIDIA GH200 480GB", 989.4, 494.7, 66.9),
        ("NVIDIA GH200 144G HBM3e", 989.4, 494.7, 66.9),
        ("NVIDIA B200", 2250, 1100, 75),
        ("NVIDIA GeForce RTX 3090", 71, 35.6, 35.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6, 82.6),
        ("NVIDIA GeForce RTX 5090", 209.5, 104.8, 104.8),
        ("NVIDIA RTX A6000", 154.8, 77.4, 38.7),
        ("NVIDIA RTX 6000 Ada Generation", 364.2, 182.1, 91.1),
    ],
)
def test_data_sheet(name: str, bf16: float | None, tf32: float | None, float32: float) -> None:
    expected = {"bf16": bf16, "tf32": tf32, "float32": float32}
    found = {precision: data_sheet_peak(name, precision) for precision in expected}
    assert found == {precision: None if rate is None else rate * 1e12 for precision, rate in expected.items()}


@pytest.mark.parametrize(
    "name",
    [
        "",
        "NVIDIA",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA A10G",
        "NVIDIA A40-48Q",
        "NVIDIA H100",
        "NVIDIA H800",
        "NVIDIA GB200",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 3090 Ti",
        "Quadro RTX 6000",
        "AMD Instinct MI300X",
    ],
)
def test_unknown_device_has_no_data_sheet(name: str) -> None:
    assert [data_sheet_peak(name, precision) for precision in ("bf16", "tf32", "float32")] == [None] * 3


def test_unknown_precision_has_no_data_sheet() -> None:
    assert data_sheet_peak("NVIDIA H200", "fp8") is None


def test_coarser_arithmetic_is_not_slower() -> None:
    for pattern, rates in peaks._DATA_SHEETS:
        fast = [rates[precision] for precision in ("bf16", "tf32", "float32") if precision in rates]
        assert fast == sorted(fast, reverse=True), pattern
        assert rates["float32"] > 1, pattern


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> int:
    size = 128
    monkeypatch.setitem(peaks._PLANS, "cpu", peaks._Plan((size // 2, size), slice=0.02, limit=0.5))
    return size


@pytest.mark.parametrize("precision", ["bf16", "tf32", "float32"])
def test_measured_peak_of_the_processor(precision: str, small: int) -> None:
    found = measured_peak(CPU, precision)
    assert found is not None
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    first, second = torch.randn(2, small, small, dtype=dtype)
    times = []
    for _ in range(20):
        started = time.perf_counter()
        first @ second
        times.append(time.perf_counter() - started)
    # The best of many on a machine that others use too: the order of magnitude is what can be held.
    assert 0.1 < found * min(times) / (2 * small**3) < 10


def test_peak_is_measured_once_per_precision_and_number_of_threads(
    monkeypatch: pytest.MonkeyPatch, small: int
) -> None:
    calls = []

    def seconds(multiply: Callable[[], object], repeats: int, device: torch.device) -> float:
        calls.append(device)
        return 1e-3 * repeats

    monkeypatch.setattr(peaks, "_seconds", seconds)
    assert measured_peak(CPU, "float32") == 2 * small**3 / 1e-3
    once = len(calls)
    measured_peak(torch.device("cpu", 0), "float32")
    assert len(calls) == once
    measured_peak(CPU, "bf16")
    assert len(calls) == 2 * once
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    measured_peak(CPU, "float32")
    assert len(calls) == 3 * once


def test_slow_device_is_measured_on_small_matrices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    product = peaks._product

    def watched(size: int, device: torch.device, precision: str) -> Callable[[], object]:
        sizes.append(size)
        return product(1, device, precision)

    monkeypatch.setattr(peaks, "_product", watched)
    # 10^9 FLOP/s: one product of the second size takes two seconds.
    monkeypatch.setattr(peaks, "_seconds", lambda multiply, repeats, device: repeats * 2e-9 * sizes[-1] ** 3)
    assert measured_peak(CPU, "float32") == pytest.approx(1e9)
    assert sizes == [512]


def test_full_memory_leaves_the_peak_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(size: int, device: torch.device, precision: str) -> Callable[[], object]:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(peaks, "_product", full)
    assert measured_peak(CPU, "float32") is None
    assert peaks_of(CPU, "float32") == {}


def test_measurement_draws_no_global_random_numbers(small: int) -> None:
    before = torch.get_rng_state()
    measured_peak(CPU, "float32")
    assert torch.equal(torch.get_rng_state(), before)


def test_processor_has_a_measured_peak_only(small: int) -> None:
    assert peaks_of(CPU, "float32") == {"mfu": measured_peak(CPU, "float32")}


def test_what_cannot_be_measured_is_refused() -> None:
    with pytest.raises(ValueError, match="precision: found 'fp8', expected bf16, tf32 or float32"):
        measured_peak(CPU, "fp8")
    with pytest.raises(ValueError, match="device: found meta, expected cuda or cpu"):
        measured_peak(torch.device("meta"), "bf16")


@pytest.mark.gpu
def test_measured_peak_of_a_gpu() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    name, switch = torch.cuda.get_device_name(device), torch.backends.cuda.matmul
    before = switch.fp32_precision
    measured_peak(device, "float32")  # loads the libraries
    for precision in ("float32", "tf32", "bf16"):
        started = time.perf_counter()
        found = measured_peak(torch.device("cuda"), precision)
        assert found is not None
        assert time.perf_counter() - started < 1
        by_data_sheet = data_sheet_peak(name, precision)
        if by_data_sheet is not None:
            assert 0.3 < found / by_data_sheet < 1.1
    assert switch.fp32_precision == before
    assert measured_peak(device, "bf16") == measured_peak(torch.device("cuda"), "bf16")
