"""Messages between rank 0 and the others: what arrives, from whom, and who is let in."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

from mlomae.distributed.wire import Message, Wire, connect, listen
from mlomae.errors import UserError


@pytest.fixture
def hub() -> Iterator[tuple[Wire, dict[str, Any]]]:
    wire, place = listen("127.0.0.1")
    yield wire, place
    wire.close()


def gather(wire: Wire, count: int) -> list[tuple[int, Message | None]]:
    """The next ``count`` arrivals."""
    arrived: list[tuple[int, Message | None]] = []
    deadline = time.monotonic() + 10
    while len(arrived) < count and time.monotonic() < deadline:
        arrived += wire.poll(0.1)
    return arrived


def test_messages_travel_both_ways_in_order(hub: tuple[Wire, dict[str, Any]]) -> None:
    wire, place = hub
    spokes = [connect(place, rank, 5) for rank in (1, 2)]
    for spoke, name in zip(spokes, "ab", strict=True):
        spoke.send({"name": name})
        spoke.send({"name": name * 2})

    arrived = gather(wire, 4)
    wire.send({"all": True})

    for rank, name in ((1, "a"), (2, "b")):
        assert [text for sender, text in arrived if sender == rank] == [{"name": name}, {"name": name * 2}]
    assert [gather(spoke, 1) for spoke in spokes] == [[(0, {"all": True})]] * 2
    for spoke in spokes:
        spoke.close()


def test_an_end_is_seen_by_both_sides(hub: tuple[Wire, dict[str, Any]]) -> None:
    wire, place = hub
    first, second = connect(place, 1, 5), connect(place, 2, 5)
    assert wire.poll(0.1) + wire.poll(0.1) == []  # what they said first is for the wire alone
    first.close()
    assert gather(wire, 1) == [(1, None)]
    wire.close()
    assert gather(second, 1) == [(0, None)]
    second.close()


def test_last_words_arrive_although_the_peer_has_not_been_read(hub: tuple[Wire, dict[str, Any]]) -> None:
    wire, place = hub
    spoke = connect(place, 1, 5)
    wire.poll(0.1)
    wire.poll(0.1)
    for number in range(100):
        wire.send({"unread": number})
    spoke.send({"ended": True})
    spoke.finish(0.2)
    assert gather(wire, 2) == [(1, {"ended": True}), (1, None)]


@pytest.mark.parametrize(
    "words",
    [
        b'{"token": "wrong", "rank": 1}\n',
        b"GET / HTTP/1.1\r\n\r\n",
        b"[]\n",
        b"\xff\xfe\n",
        b"x" * (1 << 17),
        b"",
    ],
)
def test_strangers_are_not_listened_to(hub: tuple[Wire, dict[str, Any]], words: bytes) -> None:
    wire, place = hub
    stranger = socket.create_connection(("127.0.0.1", place["port"]))
    stranger.sendall(words)
    stranger.shutdown(socket.SHUT_WR)
    spoke = connect(place, 1, 5)
    spoke.send({"name": "a"})
    assert gather(wire, 1) == [(1, {"name": "a"})]
    wire.poll(0.1)
    stranger.settimeout(5)
    with contextlib.suppress(ConnectionResetError):  # an end, too
        assert stranger.recv(1) == b""
    stranger.close()
    spoke.close()


def test_a_peer_that_does_not_read_delays_nobody(hub: tuple[Wire, dict[str, Any]]) -> None:
    wire, place = hub
    spoke = connect(place, 1, 5)
    wire.poll(0.1)
    wire.poll(0.1)
    for _ in range(2000):
        wire.send({"text": "x" * 4000})
    assert all(set(message or {}) == {"text"} for _, message in gather(spoke, 20))
    spoke.close()


def test_a_child_does_not_stand_in_for_its_parent(hub: tuple[Wire, dict[str, Any]]) -> None:
    wire, place = hub
    spoke = connect(place, 1, 5)
    wire.poll(0.1)
    wire.poll(0.1)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:  # as a loader process does that outlives its rank
        os.close(writer)
        os.read(reader, 1)
        os._exit(0)
    os.close(reader)
    try:
        spoke.close()
        assert gather(wire, 1) == [(1, None)]
    finally:
        os.close(writer)
        os.waitpid(child, 0)


def test_a_hub_that_cannot_be_reached_is_an_error_of_the_network() -> None:
    wire, place = listen("localhost")
    assert place["address"] == "localhost"
    wire.close()
    with pytest.raises(
        UserError, match=r"MASTER_ADDR: rank 1 on .* cannot reach rank 0 at localhost, port \d+"
    ):
        connect(place, 1, 1)
