"""What a run makes of its device between two log lines: speed, share of the peak, waiting, memory, energy.

Nothing here waits for a GPU: whoever runs iterations times them, and the waits in which the host learns what
they computed. What is still queued at a log line counts in the next one.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch

from mlomae.config import Config
from mlomae.distributed.env import World
from mlomae.flops import iteration_flops
from mlomae.nvml import Nvml, open_nvml
from mlomae.peaks import peaks_of

FIGURES = (
    "images_per_second",
    "flops_per_second",
    "mfu",
    "mfu_data_sheet",
    "data_wait",
    "memory/peak_bytes",
    "gpu/utilisation",
    "gpu/power_watts",
    "gpu/memory_used_bytes",
    "gpu/energy_joules_per_image",
)
"""What ``Telemetry.read`` may return in a run: figures of the machine, which no two runs share."""


class Telemetry:
    """Adds up iterations and waits; ``read`` turns them into figures.

    Speed counts the global batch, everything else is about this rank and its device.

    Args:
        images_per_iteration: pretrain images of all ranks in one outer iteration.
        flops_per_iteration: of all ranks, see ``mlomae.flops``.
        device: of this rank.
        peaks: FLOP/s of the device, by the name of the figure that is its share (``mlomae.peaks.peaks_of``).
            That of ``mfu``, which was measured, rises to what the run reaches.
        world_size: number of ranks.
        sensors: of the GPU, if there are any.
        clock: in seconds.
    """

    def __init__(
        self,
        images_per_iteration: int,
        flops_per_iteration: float,
        device: torch.device,
        peaks: Mapping[str, float],
        world_size: int = 1,
        sensors: Nvml | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.images_per_iteration = images_per_iteration
        self.flops_per_iteration = flops_per_iteration
        self.device = device
        self.peaks = dict(peaks)
        self.world_size = world_size
        self._sensors = sensors
        self._clock = clock
        self._iterations = 0
        self._seconds = 0.0
        self._waited = 0.0
        # Since the last figure of energy, which may skip a read.
        self._iterations_of_energy = 0
        if device.type == "cuda":
            # What came before, such as the measurement of the peak, is none of the run's memory.
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time within the context as waiting for data, also where it ends in an exception."""
        started = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - started

    def iterated(self, seconds: float) -> None:
        """Counts one outer iteration that took ``seconds``, waits included."""
        self._iterations += 1
        self._iterations_of_energy += 1
        self._seconds += seconds

    def waited_for_device(self, seconds: float) -> None:
        """Counts a wait for what the iterations have queued."""
        self._seconds += seconds

    def read(self) -> dict[str, float]:
        """Figures since the last read; starts again. What is unknown is absent.

        Returns:
            ``images_per_second``: of pretraining, all ranks.
            ``flops_per_second``: model FLOPs, this device.
            The names of ``peaks``: the share of each peak that this is.
            ``data_wait``: share of the time that the host waited for data. On a GPU, which may still have
            been busy with what was queued, an upper bound of what waiting cost.
            ``memory/peak_bytes``: so far. On a GPU of the allocator, on a CPU of the whole process.
            ``gpu/utilisation`` (0 to 1), ``gpu/power_watts``, ``gpu/memory_used_bytes``: at this moment.
            ``gpu/energy_joules_per_image``: energy of this GPU over the images of this rank, with what it
            drew between iterations, such as while a checkpoint was written.
        """
        figures: dict[str, float | None] = {}
        if self._seconds > 0:
            rate = self._iterations / self._seconds
            flops = rate * self.flops_per_iteration / self.world_size
            figures["images_per_second"] = rate * self.images_per_iteration
            figures["flops_per_second"] = flops
            if "mfu" in self.peaks:
                # Whoever used the device while its peak was measured has lowered it.
                self.peaks["mfu"] = max(self.peaks["mfu"], flops)
            figures |= {name: flops / peak for name, peak in self.peaks.items()}
            figures["data_wait"] = self._waited / self._seconds
        figures["memory/peak_bytes"] = _peak_bytes(self.device)
        if self._sensors is not None:
            figures["gpu/utilisation"] = self._sensors.utilisation()
            figures["gpu/power_watts"] = self._sensors.power()
            figures["gpu/memory_used_bytes"] = self._sensors.memory_used()
            figures["gpu/energy_joules_per_image"] = self._energy_per_image(self._sensors)
        self._iterations, self._seconds, self._waited = 0, 0.0, 0.0
        return {name: float(value) for name, value in figures.items() if value is not None}

    def _energy_per_image(self, sensors: Nvml) -> float | None:
        joules = sensors.energy()
        if joules is None:
            return None
        images = self._iterations_of_energy * self.images_per_iteration / self.world_size
        self._iterations_of_energy = 0
        return joules / images if images else None


def run_telemetry(
    config: Config, world: World, precision: str, num_classes: int | None, estimator: str | None
) -> Telemetry:
    """The telemetry of a run; measures the device's peak, which takes about half a second.

    Args:
        precision: bf16, tf32 or float32: that of the peaks.
        num_classes: of the head; None where the images have no labels.
        estimator: of the influence, resolved; None for policies that do not learn.
    """
    return Telemetry(
        images_per_iteration=config.pretrain.unroll_steps * config.pretrain.batch_size,
        flops_per_iteration=sum(iteration_flops(config, num_classes or 0, estimator).values()),
        device=world.device,
        peaks=peaks_of(world.device, precision),
        world_size=world.size,
        sensors=open_nvml(world.device),
    )


def _peak_bytes(device: torch.device) -> int | None:
    """Most memory so far: allocated by this process on a GPU, resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _peak_resident_bytes()


def _peak_resident_bytes(status: Path = Path("/proc/self/status")) -> int | None:
    # Linux's getrusage starts from what the parent process had, which a launcher's size would hide.
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", status.read_text(), re.MULTILINE)
    except OSError:
        found = None
    if found is not None:
        return int(found[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
