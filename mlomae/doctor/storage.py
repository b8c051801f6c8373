"""Shared memory, open files, and the folder of the runs: room, speed, locks."""

from __future__ import annotations

import fcntl
import os
import resource
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path

from mlomae.doctor.checks import Check, Finding, absent, ok, problem

GROUP = "storage"
MB = 10**6
LEAST_FREE = 2000 * MB  # a checkpoint of ViT-B takes 1.3 GB
LEAST_SPEED = 20 * MB  # per second: such a checkpoint would take more than a minute
LEAST_SHARED = 1000 * MB
LEAST_FILES = 1024
# What is written at most, and for how long at most.
_BLOCK, _BLOCKS, _SECONDS = 4 * 2**20, 16, 0.3
_SHARED = Path("/dev/shm")


def storage_checks(folder: Path) -> list[Check]:
    """
    Args:
        folder: of the runs; what is not there yet is looked at where it would be made.
    """
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    elsewhere = "choose another folder with --run-dir"
    return [
        Check(GROUP, "shared memory", _shared, "docker run --shm-size 8g, or --data.workers 0"),
        Check(GROUP, "open files", _open_files, "ask the administrator for a higher limit"),
        Check(GROUP, "free space", partial(_free, there), elsewhere),
        Check(GROUP, "speed", partial(_speed, there), elsewhere),
        Check(GROUP, "locks", partial(_locks, there), f"{elsewhere}, on a file system with locks"),
    ]


def _shared() -> Finding:
    if not _SHARED.is_dir():
        return absent(f"no {_SHARED} on this system")
    size = shutil.disk_usage(_SHARED)
    text = f"{_SHARED}: {_gb(size.free)} of {_gb(size.total)} free"
    few = "; batches of loader processes pass through it"
    return ok(text) if size.free >= LEAST_SHARED else problem(text + few)


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return ok("no limit")
    text = f"{soft:,} at a time"
    if soft >= LEAST_FILES:
        return ok(text)
    return problem(text, f"ulimit -n {hard}" if hard >= LEAST_FILES else "")


def _free(folder: Path) -> Finding:
    size = shutil.disk_usage(folder)
    text = f"{folder}: {_gb(size.free)} of {_gb(size.total)} free"
    return ok(text) if size.free >= LEAST_FREE else problem(text)


def _speed(folder: Path) -> Finding:
    block = os.urandom(_BLOCK)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".mlomae-doctor-", buffering=0) as file:
        start, written = time.perf_counter(), 0
        while written < _BLOCKS and time.perf_counter() - start < _SECONDS:
            file.write(block)
            written += 1
        os.fsync(file.fileno())
        write = written * _BLOCK / (time.perf_counter() - start)
        if hasattr(os, "posix_fadvise"):
            # Otherwise memory is read, not the disk.
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        start = time.perf_counter()
        for _ in range(written):
            if file.read(_BLOCK) != block:
                return problem(f"{folder}: what is read is not what was written", "check the disk")
        read = written * _BLOCK / (time.perf_counter() - start)
    text = f"{folder}: {write / MB:,.0f} MB/s written, {read / MB:,.0f} MB/s read"
    return ok(text) if min(write, read) >= LEAST_SPEED else problem(text)


def _locks(folder: Path) -> Finding:
    with (
        tempfile.NamedTemporaryFile(dir=folder, prefix=".mlomae-doctor-") as first,
        open(first.name) as second,
    ):
        fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return ok(f"{folder}: a second run is kept out")
    return problem(f"{folder}: a lock does not keep a second run out")


def _gb(count: float) -> str:
    return f"{count / 1e9:,.1f} GB"
