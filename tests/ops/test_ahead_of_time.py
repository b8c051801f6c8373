"""The Triton kernels compile for every GPU that is supported, without spills and within their record.

What is compared depends on the compiler: with another version of Triton than the record names, only
spills and limits are checked, from 3.8 on. After a change that is meant to need more, rewrite the record by
``python -m tests.ops.ahead_of_time --update``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import triton

from mlomae.doctor.software import release
from tests.ops.ahead_of_time import RECORD, TARGETS, Usage, cases

# A kernel may need so many more registers per thread (the step in which they are given out) and bytes of
# shared memory than the record says.
_REGISTER_MARGIN = 8
_SHARED_MARGIN = 1024
# Of a processor, and what a program gets without asking for more.
_REGISTERS_OF_PROCESSOR = 65536
_SHARED_LIMIT = 48 * 1024

pytestmark = pytest.mark.slow
each_gpu = pytest.mark.parametrize("gpu", TARGETS)
# Triton 3.6 gives out more registers, and spills two of them once.
own_compiler = pytest.mark.skipif(
    release(triton.__version__) < (3, 8), reason="launch rules were derived from what triton 3.8 compiles"
)
each_nvidia_gpu = pytest.mark.parametrize("gpu", [name for name in TARGETS if name.startswith("sm_")])


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The output of the compilation, in a process that does not interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    command = [sys.executable, "-m", "tests.ops.ahead_of_time"]
    root = RECORD.parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def _usage(report: dict[str, Any], gpu: str) -> dict[str, Usage]:
    if gpu in report["skipped"]:
        pytest.skip(f"Triton cannot compile for {gpu} here: {report['skipped'][gpu]}")
    return {case: Usage(*numbers) for case, numbers in report["usage"][gpu].items()}


@own_compiler
@each_gpu
def test_compiles_without_spills_and_within_limits(report: dict[str, Any], gpu: str) -> None:
    usage = _usage(report, gpu)
    assert set(usage) == set(cases())
    assert {case: needs.spills for case, needs in usage.items() if needs.spills} == {}
    assert {case: needs.shared for case, needs in usage.items() if needs.shared > _SHARED_LIMIT} == {}


@each_nvidia_gpu
def test_rows_are_moved_in_vectors(report: dict[str, Any], gpu: str) -> None:
    moving = {c: needs for c, needs in _usage(report, gpu).items() if c.startswith(("gather", "scatter"))}
    assert moving
    assert {case: needs.store for case, needs in moving.items() if needs.store < 16} == {}


@own_compiler
@each_nvidia_gpu
def test_programs_that_share_the_batch_run_at_once(report: dict[str, Any], gpu: str) -> None:
    # Otherwise the last few would run alone while the rest of the GPU waits.
    sharing = ("gather_backward pos", "scatter_backward")
    usage = {case: needs for case, needs in _usage(report, gpu).items() if case.startswith(sharing)}
    assert usage
    assert {case: needs for case, needs in usage.items() if _registers(needs) > _REGISTERS_OF_PROCESSOR} == {}


def _registers(needs: Usage) -> int:
    """Those of all programs on one processor; a thread gets a multiple of 8."""
    return -(-needs.registers // 8) * 8 * needs.threads * needs.programs


@each_gpu
def test_needs_no_more_than_its_record(report: dict[str, Any], gpu: str) -> None:
    record = json.loads(RECORD.read_text())
    usage = _usage(report, gpu)
    recorded = record["registers and shared memory"].get(gpu, {})
    assert set(recorded) == set(usage), "python -m tests.ops.ahead_of_time --update"
    if record["triton"] != triton.__version__:
        pytest.skip(f"the record is of Triton {record['triton']}; this is {triton.__version__}")
    more = {
        case: (needs.registers, needs.shared, recorded[case])
        for case, needs in usage.items()
        if needs.registers > recorded[case][0] + _REGISTER_MARGIN
        or needs.shared > recorded[case][1] + _SHARED_MARGIN
    }
    assert more == {}, "(registers, shared memory, record)"
