"""Runs a function on several ranks and brings their results home."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

# A rank that hangs is killed: imports, start-up and the work of one test take a fraction of this.
TIMEOUT = 240.0


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Calls ``function(*args)`` in ``world_size`` processes with a launcher's environment variables.

    Returns:
        What each rank returned, in rank order. Tensors travel by value.

    Raises:
        AssertionError: a rank raised, died or did not answer in time; all of them are dead then.
    """
    # Forks of this process would inherit what earlier tests left in it: locks of compiler threads that do not
    # live in the fork, and autograd's, which refuses to work there.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["deepspeed", "mlomae.trainer"])
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        context.Process(target=_rank, args=(sender, rank, world_size, port, function, args), daemon=True)
        for rank, (_, sender) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, sender in pipes:
        sender.close()
    try:
        return _collect([receiver for receiver, _ in pipes])
    finally:
        for process in processes:
            process.kill()
            process.join()


def free_port() -> int:
    """A TCP port of this machine that nobody uses at the moment.

    It is taken later, so that test processes side by side (pytest -n) choose among different ones.
    """
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    count = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    while True:
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = int(listener.getsockname()[1])
        if port // 2 % count == number:  # the system gives such ports out by twos
            return port


def _collect(receivers: list[Connection]) -> list[Any]:
    results: dict[Connection, Any] = {}
    deadline = time.monotonic() + TIMEOUT
    while len(results) < len(receivers):
        pending = [receiver for receiver in receivers if receiver not in results]
        ready = wait(pending, timeout=max(0.0, deadline - time.monotonic()))
        assert ready, f"{len(pending)} of {len(receivers)} ranks did not finish within {TIMEOUT} s"
        for receiver in ready:
            assert isinstance(receiver, Connection)
            try:
                failure, result = pickle.loads(receiver.recv_bytes())
            except EOFError:
                failure, result = "the process died", None
            assert failure is None, f"rank {receivers.index(receiver)}: {failure}"
            results[receiver] = result
    return [results[receiver] for receiver in receivers]


def _rank(
    sender: Connection,
    rank: int,
    world_size: int,
    port: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    failure, result = None, None
    try:
        result = function(*args)
    except BaseException:
        failure = traceback.format_exc()
    sender.send_bytes(pickle.dumps((failure, result)))
