"""Processors against threads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mlomae.doctor import devices
from mlomae.doctor.checks import Result, carry_out


def result(name: str) -> Result:
    (check,) = (check for check in devices.device_checks() if check.name == name)
    return carry_out(check)


@pytest.mark.parametrize(
    ("quota", "usable"),
    [("max 100000", 8), ("200000 100000", 2), ("50000 100000", 1), ("1600000 100000", 8), (None, 8)],
)
def test_containers_limit_processors(
    quota: str | None, usable: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if quota is not None:
        (tmp_path / "cpu.max").write_text(f"{quota}\n")
    monkeypatch.setattr(devices, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))

    assert devices.usable_processors() == usable


def test_more_threads_than_processors_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "usable_processors", lambda: 4)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert result("processor").status == "ok"

    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert result("processor").found.endswith("4 usable, 64 threads of torch's: they wait for each other")
    assert result("processor").fix == "set OMP_NUM_THREADS=4"


@pytest.mark.parametrize(("there", "status"), [(True, "ok"), (False, "absent")])
def test_bf16_in_hardware_is_optional(there: bool, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlomae.precision.cpu_has_bf16", lambda: there)

    assert result("bf16 on the processor").status == status


def test_no_gpu_is_no_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    assert result("GPUs").status == "absent"
    assert not devices.has_gpu()


@pytest.mark.gpu
def test_a_gpu_is_named() -> None:
    assert result("GPUs").status == "ok"
    assert torch.cuda.get_device_name(0) in result("GPUs").found
