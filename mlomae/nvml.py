"""What NVIDIA's management library tells about one GPU: utilisation, power, energy and memory.

Read from the driver on the host; nothing waits for the GPU. The library is the package nvidia-ml-py, whose
module is called pynvml. Every figure is of the whole GPU, whoever uses it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class Nvml:
    """The sensors of one GPU. A quantity that cannot be had is None, each on its own.

    Args:
        library: the module pynvml, initialised.
        handle: its handle of the GPU.
        clock: in seconds.
    """

    def __init__(self, library: Any, handle: Any, clock: Callable[[], float] = time.perf_counter) -> None:
        self._library = library
        self._handle = handle
        self._clock = clock
        self._counter = self._energy_counter()
        self._sample = self._power_sample()

    def utilisation(self) -> float | None:
        """Share of the last driver sample (a sixth of a second to one) in which a kernel ran, 0 to 1."""
        rates = self._query("nvmlDeviceGetUtilizationRates")
        return None if rates is None else rates.gpu / 100

    def power(self) -> float | None:
        """Watts that the GPU and its memory draw now; on some generations a mean over the last second."""
        milliwatts = self._query("nvmlDeviceGetPowerUsage")
        return None if milliwatts is None else milliwatts / 1000

    def memory_used(self) -> int | None:
        """Bytes of GPU memory in use, by all processes and the driver."""
        memory = self._query("nvmlDeviceGetMemoryInfo")
        return None if memory is None else int(memory.used)

    def energy(self) -> float | None:
        """Joules since the last answer that was not None, or since this object was made.

        From the GPU's own counter where there is one (Volta and later), else from the power at both ends of
        that time, as if it changed linearly: a coarse figure, better the more often it is asked for.

        Returns:
            None where it cannot be had, and as long as the counter, which moves some ten times per second,
            has not moved; the next answer then covers that time too.
        """
        if self._counter is not None:
            counter = self._energy_counter()
            if counter is None or counter <= self._counter:
                return None
            joules, self._counter = (counter - self._counter) / 1000, counter
            return joules
        before, sample = self._sample, self._power_sample()
        if sample is None:
            return None
        self._sample = sample
        if before is None:
            return None
        return (sample[0] - before[0]) * (sample[1] + before[1]) / 2

    def _energy_counter(self) -> int | None:
        """Millijoules since the driver was loaded."""
        counter = self._query("nvmlDeviceGetTotalEnergyConsumption")
        return None if counter is None else int(counter)

    def _power_sample(self) -> tuple[float, float] | None:
        """The present time and watts."""
        watts = self.power()
        return None if watts is None else (self._clock(), watts)

    def _query(self, function: str) -> Any:
        return _query(self._library, function, self._handle)


def open_nvml(device: torch.device, library: Any = None) -> Nvml | None:
    """The sensors of the physical GPU that torch calls ``device``.

    It is found by its UUID, because CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER renumber what torch sees.

    Args:
        library: in place of the module pynvml.

    Returns:
        None on other devices, without the package or its driver, and for a slice of a GPU (MIG): what the
        library tells is about the whole of it, which others use too.
    """
    if device.type != "cuda":
        return None
    library = _import_library() if library is None else library
    if library is None:
        return None
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    try:
        # The library counts these calls; ours ends with the process, as torch's own does.
        library.nvmlInit()
        handle = library.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
    except library.NVMLError:
        return None
    mode = _query(library, "nvmlDeviceGetMigMode", handle)
    if mode is not None and mode[0] == library.NVML_DEVICE_MIG_ENABLE:
        return None
    return Nvml(library, handle)


def _import_library() -> Any:
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


def _query(library: Any, function: str, handle: Any) -> Any:
    """What the library answers about a GPU; None where it has no answer."""
    try:
        return getattr(library, function)(handle)
    except (library.NVMLError, AttributeError):  # AttributeError: an older library without this function
        return None
