"""Sums over processes that are really started."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from mlomae.doctor.checks import carry_out
from mlomae.doctor.processes import SECONDS, all_reduce, process_checks

pytestmark = pytest.mark.dist


def children() -> set[str]:
    """Process ids of those that this process has started."""
    task = Path("/proc/self/task") / str(os.getpid()) / "children"
    return set(task.read_text().split()) if task.exists() else set()


def test_two_processes_add_their_numbers() -> None:
    before = children()
    found = all_reduce("gloo", 2, SECONDS)

    assert found.status == "ok"
    assert found.text.startswith("2 processes added their numbers, ")
    assert children() <= before


def test_processes_that_do_not_answer_are_given_up() -> None:
    before, start = children(), time.monotonic()
    found = all_reduce("gloo", 2, 0.2)

    assert (found.status, found.text) == ("problem", "no sum of 2 processes after 0 s")
    assert time.monotonic() - start < SECONDS / 2
    assert children() <= before


def test_the_reason_of_a_failed_process_is_told() -> None:
    found = all_reduce("smoke-signals", 1, SECONDS)

    assert found.status == "problem"
    assert "smoke-signals" in found.text


def test_nccl_is_looked_at_where_there_are_gpus() -> None:
    import torch

    (nccl,) = (check for check in process_checks() if check.name == "NCCL")

    assert carry_out(nccl).status == ("ok" if torch.cuda.is_available() else "absent")
