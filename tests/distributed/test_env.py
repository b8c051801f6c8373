"""Ranks and devices from the launcher's environment variables."""

from __future__ import annotations

import os

import pytest
import torch
import torch.distributed as dist

from mlomae.distributed.env import World, join_world, leave_world
from mlomae.errors import UserError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


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
