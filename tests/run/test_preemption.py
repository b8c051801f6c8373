"""Signals to stop: at once where nothing is lost, after the iteration where something would be."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from mlomae.errors import Preempted
from mlomae.preemption import SIGNALS, Preemption


def send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_stops_at_once(number: signal.Signals) -> None:
    with (
        pytest.raises(Preempted, match=rf"^stopped by {number.name}; the same command goes on"),
        Preemption(),
    ):
        send(number)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_remembered_where_it_would_lose_work(number: signal.Signals) -> None:
    done = []
    with Preemption() as preemption, pytest.raises(Preempted), preemption.deferred():
        assert not preemption.requested
        send(number)
        assert preemption.requested
        assert preemption.reason == number.name
        done.append("the rest of the iteration")
    assert done


def test_what_is_raised_inside_goes_before() -> None:
    with Preemption() as preemption, pytest.raises(ValueError, match="first"), preemption.deferred():
        send(signal.SIGUSR1)
        raise ValueError("first")


def test_after_deferring_a_signal_stops_at_once_again() -> None:
    with Preemption() as preemption:
        with preemption.deferred():
            pass
        with pytest.raises(Preempted):
            send(signal.SIGTERM)


def test_handlers_from_before_are_put_back() -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: received.append(number))
    try:
        with Preemption():
            pass
        send(signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert received == [signal.SIGUSR1]


def test_another_thread_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def use() -> None:
        with Preemption() as preemption:
            seen.append((signal.getsignal(signal.SIGTERM), preemption.requested))

    thread = threading.Thread(target=use)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
