"""Memory of processes as the kernel accounts for it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import pytest

MIB = 2**20
# Pages of files, such as torch's libraries, are left out: how many processes share them is not our doing.
_COUNTED = re.compile(r"^Pss_(?:Anon|Shmem):\s+(\d+) kB$", re.MULTILINE)


def memory_of(processes: Iterable[int]) -> float:
    """MiB of the processes with these numbers; what they share counts once."""
    kilobytes = [int(size) for process in processes for size in _COUNTED.findall(_rollup(process))]
    return 1024 * sum(kilobytes) / MIB


def skip_without_accounts() -> None:
    """Skips the test on systems that do not tell the memory of a process."""
    if not Path("/proc/self/smaps_rollup").exists() or not _COUNTED.search(_rollup("self")):
        pytest.skip("this system does not tell the memory of a process in /proc/PID/smaps_rollup")


def _rollup(process: int | str) -> str:
    return Path(f"/proc/{process}/smaps_rollup").read_text()
