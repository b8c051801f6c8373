"""The GPU's sensors, on a library that stands in for pynvml, and on the real one."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mlomae.nvml import Nvml, open_nvml

GPU = torch.device("cuda", 1)
UUID = "01234567-89ab-cdef-0123-456789abcdef"
QUERIES = ("UtilizationRates", "PowerUsage", "MemoryInfo", "TotalEnergyConsumption")


class LibraryError(Exception):
    """Stands for pynvml.NVMLError."""


class Library:
    """Stands for the module pynvml: a machine with one GPU, whose sensors a test sets.

    Attributes:
        broken: names of functions that fail.
    """

    NVMLError = LibraryError
    NVML_DEVICE_MIG_ENABLE = 1

    def __init__(self, *broken: str) -> None:
        self.broken = {f"nvml{name}" for name in broken}
        self.initialised = False
        self.mig = [0, 0]
        self.percent, self.milliwatts, self.millijoules, self.bytes = 87, 312_500, 5_000_000, 3 * 2**30
        self.asked_for: list[str] = []

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml"):
            if name in self.broken:
                raise LibraryError(name)
            assert name == "nvmlInit" or self.initialised
        return super().__getattribute__(name)

    def nvmlInit(self) -> None:
        self.initialised = True

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked_for.append(uuid)
        if uuid != f"GPU-{UUID}":
            raise LibraryError("not found")
        return "handle"

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        assert handle == "handle"
        return self.mig

    def nvmlDeviceGetUtilizationRates(self, handle: str) -> Any:
        assert handle == "handle"
        return SimpleNamespace(gpu=self.percent, memory=12)

    def nvmlDeviceGetPowerUsage(self, handle: str) -> int:
        assert handle == "handle"
        return self.milliwatts

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        assert handle == "handle"
        return SimpleNamespace(total=80 * 2**30, used=self.bytes, free=0)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        assert handle == "handle"
        return self.millijoules


@pytest.fixture
def uuid(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What torch tells about its GPU 1; a test may change it."""
    properties = SimpleNamespace(uuid=UUID)

    def found(device: torch.device) -> SimpleNamespace:
        assert device == GPU
        return properties

    monkeypatch.setattr(torch.cuda, "get_device_properties", found)
    return properties


def _figures(sensors: Nvml) -> list[float | None]:
    return [sensors.utilisation(), sensors.power(), sensors.memory_used(), sensors.energy()]


def test_sensors_are_those_of_the_gpu_that_torch_names(uuid: SimpleNamespace) -> None:
    library = Library()
    sensors = open_nvml(GPU, library)
    assert sensors is not None and library.asked_for == [f"GPU-{UUID}"]
    library.millijoules += 4_250
    assert _figures(sensors) == [0.87, 312.5, 3 * 2**30, 4.25]


def test_uuid_may_carry_its_prefix(uuid: SimpleNamespace) -> None:
    uuid.uuid = f"GPU-{UUID}"
    assert open_nvml(GPU, Library()) is not None


def test_idle_gpu_reads_as_zero(uuid: SimpleNamespace) -> None:
    library = Library()
    sensors = open_nvml(GPU, library)
    assert sensors is not None
    library.percent = 0
    assert sensors.utilisation() == 0.0


@pytest.mark.parametrize("broken", ["Init", "DeviceGetHandleByUUID"])
def test_no_driver_or_unknown_gpu_has_no_sensors(uuid: SimpleNamespace, broken: str) -> None:
    assert open_nvml(GPU, Library(broken)) is None


def test_slice_of_a_gpu_has_no_sensors(uuid: SimpleNamespace) -> None:
    library = Library()
    library.mig = [1, 1]
    assert open_nvml(GPU, library) is None
    # A slice's own UUID is no GPU's.
    uuid.uuid = "MIG-01234567"
    assert open_nvml(GPU, Library()) is None


def test_gpu_without_slices_has_sensors(uuid: SimpleNamespace) -> None:
    assert open_nvml(GPU, Library("DeviceGetMigMode")) is not None
    # Slices that begin after the next reset are none yet.
    library = Library()
    library.mig = [0, 1]
    assert open_nvml(GPU, library) is not None


@pytest.mark.parametrize("number", range(len(QUERIES)))
def test_each_quantity_fails_on_its_own(uuid: SimpleNamespace, number: int) -> None:
    library = Library()
    sensors = open_nvml(GPU, library)
    assert sensors is not None
    library.broken = {f"nvmlDeviceGet{QUERIES[number]}"}
    library.millijoules += 1
    figures = _figures(sensors)
    assert figures[number] is None
    assert None not in figures[:number] + figures[number + 1 :]


def test_older_library_lacks_a_function(uuid: SimpleNamespace) -> None:
    library = Library()
    names = ("NVMLError", "nvmlInit", "nvmlDeviceGetHandleByUUID")
    library.nvmlInit()
    sensors = open_nvml(GPU, SimpleNamespace(**{name: getattr(library, name) for name in names}))
    assert sensors is not None
    assert _figures(sensors) == [None] * 4


def test_energy_is_that_since_the_last_answer() -> None:
    library = Library()
    library.nvmlInit()
    sensors = Nvml(library, "handle")
    answers = []
    for millijoules in (1_000, 2_500, 0, 500):
        library.millijoules += millijoules
        answers.append(sensors.energy())
    # The counter did not move: not zero, but not known yet.
    assert answers == [1.0, 2.5, None, 0.5]


def test_energy_of_a_time_without_answer_comes_with_the_next() -> None:
    library = Library()
    library.nvmlInit()
    sensors = Nvml(library, "handle")
    library.broken = {"nvmlDeviceGetTotalEnergyConsumption"}
    library.millijoules += 700
    assert sensors.energy() is None
    library.broken = set()
    library.millijoules += 300
    assert sensors.energy() == 1.0


def test_counter_that_starts_again_gives_no_negative_energy() -> None:
    library = Library()
    library.nvmlInit()
    sensors = Nvml(library, "handle")
    library.millijoules = 0
    assert sensors.energy() is None


def test_energy_without_a_counter_is_power_over_time() -> None:
    library, now = Library("DeviceGetTotalEnergyConsumption"), [10.0]
    library.nvmlInit()
    library.milliwatts = 100_000
    sensors = Nvml(library, "handle", clock=lambda: now[0])
    now[0], library.milliwatts = 12.0, 300_000
    assert sensors.energy() == 2 * (100 + 300) / 2
    now[0], library.milliwatts = 13.0, 500_000
    assert sensors.energy() == 1 * (300 + 500) / 2
    # A reading is missing: the next one covers its time too.
    library.broken.add("nvmlDeviceGetPowerUsage")
    now[0] = 14.0
    assert sensors.energy() is None
    library.broken.discard("nvmlDeviceGetPowerUsage")
    now[0] = 15.0
    assert sensors.energy() == 2 * 500


def test_energy_needs_two_readings_of_the_power() -> None:
    library, now = Library("DeviceGetTotalEnergyConsumption", "DeviceGetPowerUsage"), [0.0]
    library.nvmlInit()
    sensors = Nvml(library, "handle", clock=lambda: now[0])
    assert sensors.energy() is None
    library.broken.discard("nvmlDeviceGetPowerUsage")
    now[0] = 1.0
    assert sensors.energy() is None
    now[0] = 2.0
    assert sensors.energy() == pytest.approx(312.5)


def test_processor_has_no_sensors() -> None:
    assert open_nvml(torch.device("cpu"), Library()) is None


def test_missing_package_means_no_sensors(uuid: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert open_nvml(GPU) is None


def test_real_library_without_a_driver_or_this_gpu_means_no_sensors(uuid: SimpleNamespace) -> None:
    pytest.importorskip("pynvml")
    assert open_nvml(GPU) is None


@pytest.mark.gpu
def test_sensors_of_a_gpu() -> None:
    if open_nvml(torch.device("cuda")) is None:
        pytest.skip("needs pynvml and a whole GPU")
    sensors = open_nvml(torch.device("cuda", torch.cuda.current_device()))
    assert sensors is not None
    for _ in range(200):
        torch.randn(2048, 2048, device="cuda").square().sum().item()
    utilisation, watts, used = sensors.utilisation(), sensors.power(), sensors.memory_used()
    assert utilisation is None or 0 <= utilisation <= 1
    assert watts is None or 1 < watts < 2000
    assert used is None or used >= torch.cuda.memory_reserved()
