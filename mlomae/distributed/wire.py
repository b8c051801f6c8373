"""Short messages between rank 0 and every other rank, on sockets of their own and without blocking.

Not torch's store: its client waits without limit for a host that is gone, prints a C++ stack where the store
has ended, and never learns that another client died. A socket of each rank tells at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import socket
import time
from collections.abc import Mapping
from typing import Any

from mlomae.errors import UserError

Message = dict[str, Any]
# Of unread or unsent text per peer, in bytes: far above what a peer that reads and writes leaves.
_LIMIT = 1 << 16


class Link:
    """One connection: a JSON object per line, both ways."""

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = connection
        self._inbox = self._outbox = b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends what the peer takes now; the rest goes with the next message."""
        if len(self._outbox) < _LIMIT:
            self._outbox += json.dumps(message).encode() + b"\n"
        with contextlib.suppress(OSError):  # full, or broken: reading tells which
            self._outbox = self._outbox[self.socket.send(self._outbox) :]

    def receive(self) -> tuple[list[Message], bool]:
        """The messages that have arrived, and whether the peer has closed.

        Raises:
            OSError: the network gave up; whether the peer lives is unknown.
            ValueError: this is not one of our messages.
        """
        closed = False
        while len(self._inbox) < _LIMIT:
            try:
                text = self.socket.recv(_LIMIT)
            except BlockingIOError:
                break
            except (ConnectionResetError, BrokenPipeError):
                text = b""
            if not text:
                closed = True
                break
            self._inbox += text
        *lines, self._inbox = self._inbox.split(b"\n")
        if len(self._inbox) >= _LIMIT:
            raise ValueError("a line without end")
        messages = [json.loads(line) for line in lines]
        if not all(isinstance(message, dict) for message in messages):
            raise ValueError("not an object")
        return messages, closed


class Wire:
    """The connections of one rank: rank 0 has one to each other rank, the others have one to rank 0.

    Args:
        links: by rank.
        listener: where the other ranks come in (rank 0).
        token: what they have to say first.
    """

    def __init__(
        self, links: dict[int, Link], listener: socket.socket | None = None, token: str = ""
    ) -> None:
        self._links = links
        self._listener = listener
        self._token = token
        self._strangers: list[Link] = []
        self._selector = selectors.DefaultSelector()
        for rank, link in links.items():
            self._selector.register(link.socket, selectors.EVENT_READ, (rank, link))
        if listener is not None:
            listener.setblocking(False)
            self._selector.register(listener, selectors.EVENT_READ)
        # A loader process that outlives this one must not look like it to the peers.
        os.register_at_fork(after_in_child=self.close)

    def send(self, message: Mapping[str, Any]) -> None:
        """To every peer."""
        for link in self._links.values():
            link.send(message)

    def poll(self, timeout: float) -> list[tuple[int, Message | None]]:
        """What arrives within ``timeout`` seconds, by rank; None: that peer has closed."""
        arrived: list[tuple[int, Message | None]] = []
        for key, _ in self._selector.select(timeout):
            if key.data is None:
                self._admit()
                continue
            rank, link = key.data
            try:
                messages, closed = link.receive()
                if rank is None and messages:
                    rank = self._introduce(link, messages.pop(0))
            except (OSError, ValueError):
                self._drop(rank, link)
                continue
            if rank is not None:
                arrived += [(rank, message) for message in messages]
            if closed:
                self._drop(rank, link)
                if rank is not None:
                    arrived.append((rank, None))
        return arrived

    def finish(self, seconds: float) -> None:
        """Lets the peers read what was sent, then closes; takes ``seconds`` at most.

        A socket that is closed before all is read from it takes what was sent along.
        """
        for link in self._links.values():
            with contextlib.suppress(OSError):  # closed by the peer
                link.socket.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + seconds
        while self._links and (left := deadline - time.monotonic()) > 0:
            self.poll(left)
        self.close()

    def close(self) -> None:
        """Closes everything, here only: processes that share the sockets keep them."""
        for link in (*self._links.values(), *self._strangers):
            link.socket.close()
        if self._listener is not None:
            self._listener.close()
        self._selector.close()

    def _admit(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return  # gone again
        link = Link(connection)
        self._strangers.append(link)
        self._selector.register(connection, selectors.EVENT_READ, (None, link))

    def _introduce(self, link: Link, hello: Message) -> int:
        rank = hello.get("rank")
        if hello.get("token") != self._token or not isinstance(rank, int) or rank in self._links:
            raise ValueError("a stranger")
        self._strangers.remove(link)
        self._links[rank] = link
        self._selector.modify(link.socket, selectors.EVENT_READ, (rank, link))
        return rank

    def _drop(self, rank: int | None, link: Link) -> None:
        self._selector.unregister(link.socket)
        link.socket.close()
        if rank is None:
            self._strangers.remove(link)
        else:
            del self._links[rank]


def listen(master: str) -> tuple[Wire, dict[str, Any]]:
    """Rank 0's end, and what the other ranks need for ``connect``.

    Args:
        master: an address that all ranks can reach, not always of this host (MASTER_ADDR).
    """
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    listener = socket.create_server(
        ("", 0), family=family, dualstack_ipv6=family is socket.AF_INET6, backlog=1024
    )
    token = secrets.token_hex(16)
    place = {"address": _own_address(master), "port": listener.getsockname()[1], "token": token}
    return Wire({}, listener, token), place


def connect(place: Mapping[str, Any], rank: int, timeout: float) -> Wire:
    """Another rank's end.

    Args:
        place: of ``listen``.
        timeout: seconds.

    Raises:
        UserError: rank 0 cannot be reached.
    """
    address, port = place["address"], place["port"]
    try:
        connection = socket.create_connection((address, port), timeout)
    except OSError as error:
        raise UserError(
            f"environment variable MASTER_ADDR: rank {rank} on {socket.gethostname()} cannot reach rank 0 at "
            f"{address}, port {port} ({error.strerror or error}); hosts must reach each other at all ports"
        ) from None
    link = Link(connection)
    link.send({"token": place["token"], "rank": rank})
    return Wire({0: link})


def _own_address(master: str) -> str:
    """This host's address on the way to ``master``; ``master`` itself where that is this host."""
    family, *_, target = socket.getaddrinfo(master, 1, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)  # chooses a route, sends nothing
        own: str = probe.getsockname()[0]
    return master if own == target[0] else own
