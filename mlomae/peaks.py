"""What a device can do at best: products per second by its data sheet, and measured.

The first is a number to compare devices and papers by, the second what remains of it in practice (clocks fall
under load). Both are FLOP/s of dense products, a multiplication with its addition counting 2; a precision is
one of ``bf16``, ``tf32`` and ``float32``, as in ``compute.precision``.
"""

from __future__ import annotations

import functools
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

_TERA = 1e12
# In 10^12 FLOP/s, without structured sparsity; of products that accumulate in float32, for which GeForce
# cards have half the rate. By the name that the driver reports, without brand; a name that carries anything
# else (a MIG slice, a laptop's or a virtual GPU) is another device. Sources: NVIDIA's data sheets of each
# product and, for the RTX cards, its white papers on the GA102, Ada and RTX Blackwell architectures.
_DATA_SHEETS: tuple[tuple[str, dict[str, float]], ...] = (
    (r"V100-SXM2-(16|32)GB", {"float32": 15.7}),
    (r"V100-PCIE-(16|32)GB", {"float32": 14.0}),
    (r"V100S-PCIE-32GB", {"float32": 16.4}),
    (r"T4", {"float32": 8.1}),
    (r"A100-(SXM4?|PCIE)-(40|80)GB|A100 80GB PCIe", {"bf16": 312.0, "tf32": 156.0, "float32": 19.5}),
    (r"A10", {"bf16": 125.0, "tf32": 62.5, "float32": 31.2}),
    (r"A30", {"bf16": 165.0, "tf32": 82.0, "float32": 10.3}),
    (r"A40", {"bf16": 149.7, "tf32": 74.8, "float32": 37.4}),
    (r"L4", {"bf16": 121.0, "tf32": 60.0, "float32": 30.3}),
    (r"L40", {"bf16": 181.05, "tf32": 90.5, "float32": 90.5}),
    (r"L40S", {"bf16": 362.05, "tf32": 183.0, "float32": 91.6}),
    (r"H100 80GB HBM3", {"bf16": 989.4, "tf32": 494.7, "float32": 66.9}),
    (r"H100 PCIe", {"bf16": 756.5, "tf32": 378.0, "float32": 51.2}),
    (r"H[12]00 NVL", {"bf16": 835.5, "tf32": 417.5, "float32": 60.0}),
    (r"H200|GH200( \d+GB?( HBM3e?)?)?", {"bf16": 989.4, "tf32": 494.7, "float32": 66.9}),
    (r"B200", {"bf16": 2250.0, "tf32": 1100.0, "float32": 75.0}),
    (r"RTX 3090", {"bf16": 71.0, "tf32": 35.6, "float32": 35.6}),
    (r"RTX 4090", {"bf16": 165.2, "tf32": 82.6, "float32": 82.6}),
    (r"RTX 5090", {"bf16": 209.5, "tf32": 104.8, "float32": 104.8}),
    (r"RTX A6000", {"bf16": 154.8, "tf32": 77.4, "float32": 38.7}),
    (r"RTX 6000 Ada Generation", {"bf16": 364.2, "tf32": 182.1, "float32": 91.1}),
)
_BRAND = re.compile(r"(NVIDIA )?(Tesla |GeForce )?")


def data_sheet_peak(device_name: str, precision: str) -> float | None:
    """FLOP/s of a GPU by its data sheet.

    Args:
        device_name: as ``torch.cuda.get_device_name`` returns it, such as ``NVIDIA H100 80GB HBM3``.
        precision: bf16, tf32 or float32.

    Returns:
        None for an unknown device, and for a precision that it has no arithmetic for.
    """
    brand = _BRAND.match(device_name)
    model = device_name[brand.end() :] if brand else device_name
    for pattern, rates in _DATA_SHEETS:
        if re.fullmatch(pattern, model):
            rate = rates.get(precision)
            return None if rate is None else rate * _TERA
    return None


@dataclass(frozen=True)
class _Plan:
    """How a device is measured.

    Attributes:
        sizes: of the square matrices, rising; small ones do not fill a large device.
        slice: seconds that one size may take, where a product takes less.
        limit: seconds altogether; a size that would pass it is left out.
    """

    sizes: tuple[int, ...]
    slice: float
    limit: float


_PLANS = {
    "cuda": _Plan(sizes=(2048, 4096, 8192), slice=0.1, limit=0.4),
    "cpu": _Plan(sizes=(512, 1024, 2048), slice=0.1, limit=0.5),
}
# Many short rounds: the fastest of them meets a moment in which nobody else uses a processor.
_ROUNDS, _MAX_REPEATS = 8, 50


def measured_peak(device: torch.device, precision: str) -> float | None:
    """FLOP/s of the fastest of a few large square products on a device; measured once in a process.

    Takes about half a second at most, beside the loading of libraries. A CPU's figure is that of torch's
    present number of threads. Whoever else uses the device lowers it.

    Args:
        device: cuda, with or without index, or cpu.
        precision: bf16, tf32 or float32. A CPU takes float32 for tf32.

    Returns:
        None where the device has no memory left for the smallest matrices.

    Raises:
        ValueError: unknown precision, or a device of another kind.
    """
    if precision not in ("bf16", "tf32", "float32"):
        raise ValueError(f"precision: found {precision!r}, expected bf16, tf32 or float32")
    if device.type not in _PLANS:
        raise ValueError(f"device: found {device}, expected cuda or cpu")
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return _measure(torch.device("cuda", index), precision, threads=0)
    return _measure(torch.device("cpu"), precision, torch.get_num_threads())


def peaks_of(device: torch.device, precision: str) -> dict[str, float]:
    """Both peaks by the names that ``Telemetry`` gives to a run's share of them; absent where unknown."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peaks = {"mfu": measured_peak(device, precision), "mfu_data_sheet": data_sheet_peak(name, precision)}
    return {share: peak for share, peak in peaks.items() if peak is not None}


@functools.cache
def _measure(device: torch.device, precision: str, threads: int) -> float | None:
    """``measured_peak`` of a device with its index; ``threads`` tells the figures of a CPU apart."""
    plan, best = _PLANS[device.type], 0.0
    started: float | None = None
    with torch.no_grad(), _rounding(device, precision):
        for size in plan.sizes:
            flops = 2 * size**3
            if started is not None:
                spent = time.perf_counter() - started
                if spent + (_ROUNDS + 2) * flops / best > plan.limit:
                    break
            try:
                multiply = _product(size, device, precision)
            except torch.OutOfMemoryError:
                break
            # The first product loads libraries and kernels.
            _seconds(multiply, 1, device)
            started = time.perf_counter() if started is None else started
            repeats = int(plan.slice / _ROUNDS / max(_seconds(multiply, 1, device), 1e-9))
            repeats = min(max(repeats, 1), _MAX_REPEATS)
            fastest = min(_seconds(multiply, repeats, device) for _ in range(_ROUNDS)) / repeats
            best = max(best, flops / fastest)
            del multiply
    if device.type == "cuda":
        # The matrices' memory lies in blocks that training would find too large or too small.
        torch.cuda.empty_cache()
    return best or None


def _product(size: int, device: torch.device, precision: str) -> Callable[[], object]:
    """A product of two random matrices: of zeros a GPU would draw less power and run faster."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    first, second = (
        torch.randn(size, size, generator=generator, device=device, dtype=dtype) for _ in range(2)
    )
    out = torch.empty_like(first)
    return lambda: torch.mm(first, second, out=out)


def _seconds(multiply: Callable[[], object], repeats: int, device: torch.device) -> float:
    """Time of ``repeats`` products, on a GPU by its own clock."""
    if device.type == "cpu":
        started = time.perf_counter()
        for _ in range(repeats):
            multiply()
        return time.perf_counter() - started
    with torch.cuda.device(device):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(repeats):
            multiply()
        end.record()
        end.synchronize()
        return 1e-3 * begin.elapsed_time(end)


@contextmanager
def _rounding(device: torch.device, precision: str) -> Iterator[None]:
    """Float32 products of a GPU as the precision rounds them."""
    if device.type != "cuda" or precision == "bf16":
        yield
        return
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    try:
        switch.fp32_precision = "tf32" if precision == "tf32" else "ieee"
        yield
    finally:
        switch.fp32_precision = before
