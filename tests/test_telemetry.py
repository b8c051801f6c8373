"""Figures between log lines, from a clock and sensors that the tests set."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

from mlomae import telemetry as module
from mlomae.distributed.env import World
from mlomae.flops import iteration_flops
from mlomae.nvml import Nvml
from mlomae.peaks import measured_peak
from mlomae.telemetry import FIGURES, Telemetry, run_telemetry
from tests.integration.tiny import tiny_config
from tests.test_nvml import Library

CPU = torch.device("cpu")
IMAGES, FLOPS = 64, 8e9
SPEED = {"images_per_second", "flops_per_second", "data_wait"}


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def test_figures_are_means_since_the_last_read(clock: Clock) -> None:
    telemetry = Telemetry(IMAGES, FLOPS, CPU, {"mfu": 1e11, "mfu_data_sheet": 2e11}, clock=clock)
    for seconds in (0.3, 0.5):
        telemetry.iterated(seconds)
    figures = telemetry.read()
    assert figures.pop("memory/peak_bytes") > 0
    assert figures == pytest.approx(
        {
            "images_per_second": 2 * IMAGES / 0.8,
            "flops_per_second": 2 * FLOPS / 0.8,
            "mfu": 0.2,
            "mfu_data_sheet": 0.1,
            "data_wait": 0.0,
        }
    )
    telemetry.iterated(0.1)
    assert telemetry.read()["images_per_second"] == pytest.approx(IMAGES / 0.1)


def test_measured_peak_is_what_was_reached_at_most(clock: Clock) -> None:
    telemetry = Telemetry(IMAGES, FLOPS, CPU, {"mfu": 1e10, "mfu_data_sheet": 1e10}, clock=clock)
    shares = []
    for seconds in (0.4, 1.6):
        telemetry.iterated(seconds)
        shares.append(telemetry.read())
    assert [figures["mfu"] for figures in shares] == pytest.approx([1.0, 0.25])
    assert [figures["mfu_data_sheet"] for figures in shares] == pytest.approx([2.0, 0.5])


def test_what_is_unknown_is_absent(clock: Clock) -> None:
    telemetry = Telemetry(IMAGES, FLOPS, CPU, {}, clock=clock)
    assert set(telemetry.read()) == {"memory/peak_bytes"}
    telemetry.iterated(1.0)
    assert set(telemetry.read()) == {"memory/peak_bytes"} | SPEED
    assert set(telemetry.read()) == {"memory/peak_bytes"}


def test_ranks_share_the_arithmetic_and_not_the_speed(clock: Clock) -> None:
    telemetry = Telemetry(IMAGES, FLOPS, CPU, {"mfu": 1e10}, world_size=4, clock=clock)
    telemetry.iterated(1.0)
    figures = telemetry.read()
    assert figures["images_per_second"] == IMAGES
    assert figures["flops_per_second"] == FLOPS / 4
    assert figures["mfu"] == pytest.approx(0.2)


def test_waits_add_up_to_a_share_of_the_time(clock: Clock) -> None:
    telemetry = Telemetry(IMAGES, FLOPS, CPU, {}, clock=clock)
    for _ in range(3):
        with telemetry.waiting():
            clock.now += 0.1
        clock.now += 0.4
    telemetry.iterated(1.2)
    assert telemetry.read()["data_wait"] == pytest.approx(0.25)
    telemetry.iterated(1.2)
    assert telemetry.read()["data_wait"] == 0.0


def test_wait_that_fails_counts(clock: Clock) -> None:
    telemetry = Telemetry(IMAGES, FLOPS, CPU, {}, clock=clock)
    with pytest.raises(KeyError), telemetry.waiting():
        clock.now += 0.5
        raise KeyError
    telemetry.iterated(1.0)
    assert telemetry.read()["data_wait"] == pytest.approx(0.5)


def _with_sensors(library: Library, clock: Clock, world_size: int = 1) -> Telemetry:
    library.nvmlInit()
    sensors = Nvml(library, "handle", clock)
    return Telemetry(IMAGES, FLOPS, CPU, {}, world_size, sensors, clock)


def test_sensors_of_the_gpu(clock: Clock) -> None:
    library = Library()
    telemetry = _with_sensors(library, clock, world_size=2)
    telemetry.iterated(1.0)
    telemetry.iterated(1.0)
    library.millijoules += 640_000
    figures = telemetry.read()
    assert {name: value for name, value in figures.items() if name.startswith("gpu/")} == {
        "gpu/utilisation": 0.87,
        "gpu/power_watts": 312.5,
        "gpu/memory_used_bytes": 3 * 2**30,
        # Two iterations, of whose images this rank has half.
        "gpu/energy_joules_per_image": 640 / IMAGES,
    }
    assert all(isinstance(value, float) for value in figures.values())


def test_every_figure_has_a_known_name(clock: Clock) -> None:
    library = Library()
    library.nvmlInit()
    peaks = {"mfu": 1e12, "mfu_data_sheet": 2e12}
    telemetry = Telemetry(IMAGES, FLOPS, CPU, peaks, sensors=Nvml(library, "handle", clock), clock=clock)
    telemetry.iterated(1.0)
    library.millijoules += 1
    assert sorted(telemetry.read()) == sorted(FIGURES)


def test_sensor_without_an_answer_is_absent(clock: Clock) -> None:
    library = Library("DeviceGetUtilizationRates", "DeviceGetPowerUsage", "DeviceGetTotalEnergyConsumption")
    telemetry = _with_sensors(library, clock)
    telemetry.iterated(1.0)
    assert set(telemetry.read()) == {"memory/peak_bytes", "gpu/memory_used_bytes"} | SPEED


def test_energy_that_comes_late_belongs_to_the_images_since_the_last(clock: Clock) -> None:
    library = Library()
    telemetry = _with_sensors(library, clock)
    telemetry.iterated(0.01)
    assert "gpu/energy_joules_per_image" not in telemetry.read()
    telemetry.iterated(0.01)
    library.millijoules += 128_000
    assert telemetry.read()["gpu/energy_joules_per_image"] == 128 / (2 * IMAGES)


def test_energy_without_iterations_belongs_to_no_image(clock: Clock) -> None:
    library = Library()
    telemetry = _with_sensors(library, clock)
    library.millijoules += 1_000
    assert "gpu/energy_joules_per_image" not in telemetry.read()
    telemetry.iterated(1.0)
    library.millijoules += 64_000
    assert telemetry.read()["gpu/energy_joules_per_image"] == 64 / IMAGES


def test_peak_memory_is_at_least_what_is_resident() -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("needs /proc")
    peak = module._peak_resident_bytes()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    # The kernel counts pages per thread and adds them up now and then.
    assert peak is not None and 0.95 * resident < peak < 2**46


def test_peak_memory_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = module._peak_resident_bytes()
    status = tmp_path / "status"
    assert known is not None
    # getrusage may start from the parent's figure, and is then larger.
    assert (module._peak_resident_bytes(status) or 0) >= 0.5 * known
    status.write_text("Name:\tpython\nVmRSS:\t 7 kB\n")
    assert (module._peak_resident_bytes(status) or 0) >= 0.5 * known
    status.write_text("VmPeak:\t 9 kB\nVmHWM:\t    5 kB\nVmRSS:\t 3 kB\n")
    assert module._peak_resident_bytes(status) == 5 * 1024
    monkeypatch.setitem(sys.modules, "resource", None)
    assert module._peak_resident_bytes(tmp_path / "absent") is None


def test_telemetry_of_a_run() -> None:
    config = tiny_config({"pretrain.unroll_steps": 3})
    telemetry = run_telemetry(config, World(0, 2, CPU), "float32", 10, "jvp")
    assert telemetry.images_per_iteration == 24
    assert telemetry.flops_per_iteration == sum(iteration_flops(config, 10, "jvp").values())
    assert telemetry.peaks == {"mfu": measured_peak(CPU, "float32")}
    assert telemetry.world_size == 2


def test_telemetry_of_a_run_without_labels() -> None:
    config = tiny_config({"masking.policy": "random"})
    telemetry = run_telemetry(config, World(0, 1, CPU), "float32", None, None)
    assert telemetry.flops_per_iteration == iteration_flops(config)["pretrain"]


@pytest.mark.gpu
def test_peak_memory_of_a_gpu_leaves_out_what_came_before() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    block = torch.empty(2**28, dtype=torch.uint8, device=device)
    del block
    telemetry = Telemetry(IMAGES, FLOPS, device, {})
    before = torch.cuda.memory_allocated(device)
    block = torch.empty(2**24, dtype=torch.uint8, device=device)
    assert telemetry.read()["memory/peak_bytes"] == before + block.nbytes
