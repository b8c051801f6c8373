"""Ranks and devices from the launcher's environment variables."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from mlomae.distributed import env
from mlomae.distributed.env import World, join_world, leave_world
from mlomae.errors import UserError

VARIABLES = (
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID",
    "SLURM_LOCALID", "SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(os, "environ", os.environ.copy())  # what is set meanwhile does not stay
    for name in VARIABLES:
        os.environ.pop(name, None)
    yield


def test_a_process_on_its_own_needs_no_group() -> None:
    world = join_world("cpu")

    assert world == World(0, 1, torch.device("cpu"))
    assert world.primary
    assert not dist.is_initialized()


def test_a_process_on_its_own_can_have_a_group_without_a_launcher() -> None:
    world = join_world("cpu", always_group=True)
    try:
        assert world.size == 1
        assert dist.get_world_size() == 1
    finally:
        leave_world()
    assert not dist.is_initialized()


def test_leaving_twice_is_harmless() -> None:
    leave_world()
    leave_world()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "one"}, "environment variable RANK: found 'one', expected a whole number"),
        ({"WORLD_SIZE": "-2"}, "environment variable WORLD_SIZE: found '-2', expected a whole number"),
        ({"LOCAL_RANK": ""}, "environment variable LOCAL_RANK: found '', expected a whole number"),
        (
            {"RANK": "2", "WORLD_SIZE": "2"},
            "environment variable RANK: found 2, expected less than WORLD_SIZE (2)",
        ),
        ({"WORLD_SIZE": "2"}, "environment variable MASTER_ADDR: missing with WORLD_SIZE=2; start with"),
        (
            {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
            "environment variable MASTER_PORT: missing with WORLD_SIZE=2; start with",
        ),
    ],
)
def test_wrong_variables_are_named(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)

    with pytest.raises(UserError) as raised:
        join_world("cpu")

    assert str(raised.value).startswith(message)
    assert not dist.is_initialized()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)

    monkeypatch.setenv("LOCAL_RANK", "1")
    assert join_world("auto").device == torch.device("cuda", 1)
    assert chosen == [torch.device("cuda", 1)]
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(
        UserError, match=r"^environment variable LOCAL_RANK: found 2, but there are 2 GPUs here;"
    ):
        join_world("auto")
    assert join_world("cpu").device == torch.device("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused() -> None:
    with pytest.raises(UserError, match=r"^device: cuda asked for, but torch sees no GPU; use auto or cpu$"):
        join_world("cuda")
    assert join_world("auto").device == torch.device("cpu")


@pytest.mark.parametrize(
    ("variable", "expected"),
    [(None, [(-4, 0), (-1, -1)]), ("MALLOC_ARENA_MAX", []), ("GLIBC_TUNABLES", [])],
)
def test_freed_memory_is_kept_unless_the_user_has_chosen(
    variable: str | None, expected: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Library:
        def mallopt(self, parameter: int, value: int) -> int:
            calls.append((parameter, value))
            return 1

    calls: list[tuple[int, int]] = []
    for name in list(os.environ):
        if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES":
            monkeypatch.delenv(name)
    if variable is not None:
        monkeypatch.setenv(variable, "1")
    monkeypatch.setattr("ctypes.CDLL", lambda _: Library())
    join_world("cpu")
    assert calls == expected


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctypes.CDLL", lambda _: object())
    assert join_world("cpu").size == 1


STEP = {
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_JOB_ID": "123456",
    "SLURM_STEP_ID": "2",
}


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the process group would be joined with."""
    calls: list[Any] = []
    monkeypatch.setattr(env, "_join_group", lambda *given: calls.append(given))
    return calls


def launcher_variables() -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in VARIABLES[:5]}


def test_a_task_of_a_slurm_step_is_a_rank(monkeypatch: pytest.MonkeyPatch, joined: list[Any]) -> None:
    set_all(monkeypatch, STEP)

    assert join_world("cpu", patience=100.0) == World(3, 4, torch.device("cpu"))

    assert joined == [("gloo", 3, 4, 100.0 + env.GRACE)]
    found = launcher_variables()
    port = found.pop("MASTER_PORT")
    assert found == {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "gpu07"}
    assert port is not None and 20000 <= int(port) < 30000


def test_steps_of_a_job_and_its_neighbours_meet_at_ports_of_their_own(
    monkeypatch: pytest.MonkeyPatch, joined: list[Any]
) -> None:
    ports = set()
    for job, step in ((1, 0), (1, 1), (2, 0), (100, 0)):
        for name in VARIABLES[:5]:
            monkeypatch.delenv(name, raising=False)
        set_all(monkeypatch, {**STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        join_world("cpu")
        ports.add(os.environ["MASTER_PORT"])
    assert len(ports) == 4


def test_an_address_that_the_job_chose_stays(monkeypatch: pytest.MonkeyPatch, joined: list[Any]) -> None:
    set_all(monkeypatch, {**STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"})
    join_world("cpu")
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.1", "29500")


def test_a_launcher_inside_a_slurm_step_goes_first(
    monkeypatch: pytest.MonkeyPatch, joined: list[Any]
) -> None:
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "h", "MASTER_PORT": "1"}
    set_all(monkeypatch, {**STEP, **torchrun})
    assert join_world("cpu") == World(1, 2, torch.device("cpu"))
    assert launcher_variables() == torchrun


def test_the_batch_script_itself_is_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"})
    assert join_world("cpu").size == 1


@pytest.mark.parametrize(
    ("local", "visible", "used"), [("1", 1, "0"), ("1", 2, "1")], ids=["bound to a GPU", "all visible"]
)
def test_a_task_uses_the_gpu_that_slurm_has_bound(
    local: str, visible: int, used: str, monkeypatch: pytest.MonkeyPatch, joined: list[Any]
) -> None:
    set_all(monkeypatch, {**STEP, "SLURM_LOCALID": local})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    assert join_world("auto").device == torch.device("cuda", int(used))
    assert os.environ["LOCAL_RANK"] == used


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("gpu[03-05,9]", "gpu03"),
        ("gpu[7,9],login1", "gpu7"),
        ("rack2-gpu[001-128]-ib,other", "rack2-gpu001-ib"),
        ("login1,gpu[1-2]", "login1"),
    ],
)
def test_first_host_of_a_list_of_nodes(nodes: str, host: str) -> None:
    assert env.first_host(nodes) == host


def test_a_step_without_nodes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    set_all(monkeypatch, {**STEP, "SLURM_STEP_NODELIST": ""})
    with pytest.raises(UserError, match=r"^environment variable SLURM_STEP_NODELIST: found ''"):
        join_world("cpu")


def set_all(monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
