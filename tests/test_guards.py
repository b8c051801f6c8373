"""The guard that names what broke, and the alarm about losses that jump."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mlomae.errors import NotFinite
from mlomae.guards import FEWEST, PEAKS, FiniteGuard, SpikeAlarm
from mlomae.logbook import Logbook
from mlomae.metrics import MetricsWriter
from mlomae.run_dir import RunDir
from tests.integration.tiny import tiny_config

FINE, BROKEN, ENDLESS = torch.tensor(1.0), torch.tensor(float("nan")), torch.tensor(float("inf"))


def test_guard_is_silent_while_everything_is_finite() -> None:
    guard = FiniteGuard()
    assert guard.check()
    for iteration in range(3):
        guard.watch("pretrain", iteration, FINE, FINE, 0)
        guard.watch("head", iteration, FINE, FINE, torch.tensor(0))
    assert guard.check()
    guard.check(at_end=True)


@pytest.mark.parametrize("value", [BROKEN, ENDLESS, -ENDLESS])
def test_guard_names_the_level_and_the_first_iteration(value: torch.Tensor) -> None:
    guard = FiniteGuard()
    for iteration in range(10):
        guard.watch("pretrain", iteration, FINE, FINE, 0)
        guard.watch("mask", iteration, value if iteration in (4, 5, 9) else FINE, FINE, 0)
    with pytest.raises(
        NotFinite, match=r"^mask level: .* not finite at iteration 4;.* mask\.lr .* mask\.clip$"
    ):
        guard.check()


def test_guard_names_the_level_that_broke_first() -> None:
    guard = FiniteGuard()
    for iteration in range(5):
        guard.watch("pretrain", iteration, BROKEN if iteration >= 3 else FINE, FINE, 0)
        guard.watch("head", iteration, BROKEN if iteration >= 2 else FINE, FINE, 0)
    with pytest.raises(NotFinite, match=r"^head level: .* iteration 2;"):
        guard.check()


def test_guard_names_the_lowest_level_of_those_that_broke_together() -> None:
    # A broken autoencoder breaks the levels above it in the same iteration: it is the cause.
    guard = FiniteGuard()
    for level in ("pretrain", "head", "mask"):
        guard.watch(level, 7, BROKEN, FINE, 0)
    with pytest.raises(NotFinite, match=r"^pretrain level: "):
        guard.check()


def test_a_few_bad_iterations_in_a_row_are_passed_over() -> None:
    guard = FiniteGuard(allowed=2)
    for iteration, bad in enumerate([0, 1, 1, 0, 1, 1, 0]):
        guard.watch("mask", iteration, BROKEN if bad else FINE, FINE, 0)
        # No checkpoint while the last one is bad.
        assert guard.check() != bool(bad)
    for iteration in (7, 8, 9):
        guard.watch("mask", iteration, BROKEN, FINE, 0)
    with pytest.raises(NotFinite, match=r"^mask level: .* iteration 7;"):
        guard.check()


def test_a_skipped_step_is_a_bad_iteration() -> None:
    # A loss may be finite where its gradient is not.
    guard = FiniteGuard(allowed=1)
    for iteration, skipped in enumerate([0, 0, 1, 1, 2, 4]):
        guard.watch("pretrain", iteration, FINE, FINE, torch.tensor(skipped))
        if iteration < 5:
            assert guard.check() == (iteration not in (2, 4))
    with pytest.raises(NotFinite, match="iteration 4;"):
        guard.check()


def test_weights_that_are_not_finite_are_never_passed_over() -> None:
    guard = FiniteGuard(allowed=5)
    guard.watch("head", 3, FINE, BROKEN, 0)
    guard.watch("head", 4, FINE, FINE, 0)
    with pytest.raises(NotFinite, match=r"^head level: .* iteration 3;"):
        guard.check()


def test_the_end_of_a_run_has_to_be_good() -> None:
    guard = FiniteGuard(allowed=2)
    guard.watch("pretrain", 8, FINE, FINE, 0)
    guard.watch("mask", 8, BROKEN, FINE, 0)
    with pytest.raises(NotFinite, match=r"^mask level: .* iteration 8;"):
        guard.check(at_end=True)


def test_a_guard_that_forgets_counts_new_skips_only() -> None:
    guard = FiniteGuard()
    guard.watch("pretrain", 3, BROKEN, BROKEN, 4)
    guard.forget()
    guard.watch("pretrain", 2, FINE, FINE, 4)
    assert guard.check()


def lines(*peaks: float) -> list[dict[str, object]]:
    return [{"step": number, "peak_loss/pretrain": peak} for number, peak in enumerate(peaks)]


def test_alarm_tells_of_a_jump_and_of_what_was_usual() -> None:
    alarm = SpikeAlarm(iter(lines(*[1.0, 1.1] * FEWEST)))
    assert alarm.jumps({"peak_loss/pretrain": 1.2, "loss/pretrain": 50.0}) == {}
    assert alarm.jumps({"peak_loss/pretrain": 2.0}) == {"pretrain": (2.0, 1.1)}
    # One jump does not change what is usual.
    assert alarm.jumps({"peak_loss/pretrain": 2.0}) == {"pretrain": (2.0, 1.1)}


def test_alarm_is_silent_about_noise_descent_and_what_it_does_not_know() -> None:
    assert SpikeAlarm(iter(lines(*[1.0] * (FEWEST - 1)))).jumps({"peak_loss/pretrain": 9.0}) == {}
    noisy = SpikeAlarm(iter(lines(*[0.5, 1.0, 1.5] * FEWEST)))
    assert noisy.jumps({"peak_loss/pretrain": 2.5}) == {}
    falling = SpikeAlarm(iter([]))
    assert not any(falling.jumps({"peak_loss/pretrain": 2.0 * 0.9**n}) for n in range(100))


def test_alarm_passes_over_what_is_no_number() -> None:
    alarm = SpikeAlarm(iter([*lines(*[1.0] * FEWEST), {"peak_loss/pretrain": None}]))
    assert alarm.jumps({"peak_loss/pretrain": float("nan")}) == {}
    assert alarm.jumps({"peak_loss/pretrain": float("inf")}) == {"pretrain": (float("inf"), 1.0)}
    assert alarm.jumps({"peak_loss/pretrain": 1.0}) == {}
    # A log has null for them, and what a resumed run knows must be the same.
    for _ in range(PEAKS):
        alarm.jumps({"peak_loss/pretrain": float("inf")})
    assert alarm.jumps({"peak_loss/pretrain": 2.0}) == {"pretrain": (2.0, 1.0)}


@pytest.mark.parametrize("primary", [True, False])
def test_one_rank_tells_of_a_jump(primary: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config({"run_dir": tmp_path, "loggers": []})
    run_dir = RunDir(tmp_path, config)
    writer = MetricsWriter(run_dir, config, primary, 9, 0, {})
    logbook = Logbook(writer, FiniteGuard(), SpikeAlarm(lines(*[1.0] * FEWEST)), "auto")
    logbook.begin(1, {"peak_loss/pretrain": torch.tensor(5.0)}, torch.ones(4), {})
    logbook.write_waiting()
    writer.close()
    assert ("jumped from 1 to 5 by iteration 1" in capsys.readouterr().out) == primary
    assert run_dir.metrics.exists() == primary
