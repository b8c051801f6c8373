"""Signals to stop: at once where nothing is lost, after the iteration where something would be."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from mlomae.errors import Interrupted, Preempted
from mlomae.preemption import Preemption

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # of schedulers


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
        assert str(preemption.stopped("step 7")) == (
            f"stopped by {number.name} after step 7, which is saved; the same command goes on"
        )
        done.append("the rest of the iteration")
    assert done


def test_another_ranks_signal_is_named_so() -> None:
    stop = Preemption().stopped("iteration 3")
    assert str(stop).startswith("stopped by a signal to another rank after iteration 3, which is saved")
    assert not isinstance(stop, Interrupted)


def test_ctrl_c_stops_at_once() -> None:
    with pytest.raises(KeyboardInterrupt), Preemption():
        send(signal.SIGINT)


def test_ctrl_c_waits_for_the_step_and_a_second_one_does_not(capfd: pytest.CaptureFixture[str]) -> None:
    done = []
    with Preemption() as preemption, pytest.raises(KeyboardInterrupt), preemption.deferred():
        send(signal.SIGINT)
        assert preemption.requested
        assert isinstance(preemption.stopped("iteration 3"), Interrupted)
        assert capfd.readouterr().err == (
            "mlomae: interrupted: saves after this step and stops; once more stops at once\n"
        )
        done.append("the rest of the iteration")
        send(signal.SIGINT)
        done.append("never")
    assert done == ["the rest of the iteration"]


def test_ctrl_c_that_a_shell_has_turned_off_stays_so() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Preemption() as preemption:
            send(signal.SIGINT)
            assert not preemption.requested
    finally:
        signal.signal(signal.SIGINT, before)


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
