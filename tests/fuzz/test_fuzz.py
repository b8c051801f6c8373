"""Broken input of every kind is read or refused in one line: no crash, no hang, nothing run, nothing written.

``MLOMAE_FUZZ=100000 pytest tests/fuzz -n0`` tries so many inputs, new ones each time; without it 2,000, the
same each time.
"""

from __future__ import annotations

import os
import shutil
import time
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS, Target
from tests.fuzz.watch import watched

INPUTS = int(os.environ.get("MLOMAE_FUZZ", "2000"))


@st.composite
def broken(draw: st.DrawFn, bases: list[bytes]) -> bytes:
    """A valid input after a few cuts, flips, insertions, repetitions and swaps; or anything."""
    content = bytearray(draw(st.sampled_from([*bases, b""])))
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(content)))
        stop = min(len(content), start + draw(st.sampled_from([0, 1, 2, 4, 16, 512])))
        match draw(st.sampled_from(["flip", "cut", "insert", "repeat", "replace", "swap"])):
            case "flip" if start < len(content):
                content[start] ^= 1 << draw(st.integers(0, 7))
            case "cut":
                del content[start : draw(st.sampled_from([stop, len(content)]))]
            case "insert":
                content[start:start] = draw(st.binary(max_size=32))
            case "repeat":
                content[start:start] = content[start:stop] * draw(st.integers(1, 8))
            case "replace":
                content[start:stop] = draw(st.sampled_from(_TELLING))
            case "swap":
                content[start:stop], content[:0] = b"", content[start:stop]
    return bytes(content)


# Numbers and texts at which readers break.
_TELLING = (
    b"", b"0", b"-1", b"1e999", b"nan", b"null", b"[]", b"{}", b"99999999999999999999", bytes(8),
    b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"../../etc/passwd", b"/tmp/x", b"*a", b"&a [*a]",
    b"!!python/object/apply:os.system [id]", b"\0", b"\n", b"\xe2\x80\xae", b"2026-02-30", b"${HOME}", b"~/x",
)  # fmt: skip


@pytest.fixture(params=TARGETS)
def target(request: pytest.FixtureRequest) -> Target:
    return TARGETS[request.param]


def test_broken_input_is_refused_in_one_line(target: Target, tmp_path: Path) -> None:
    made = tmp_path / "made"
    made.mkdir()
    bases, folder = target.bases(made), tmp_path / "run"
    # What readers import, they import before somebody watches.
    for base in bases:
        folder.mkdir(exist_ok=True)
        target.read(base, folder)
        shutil.rmtree(folder)

    @settings(
        max_examples=max(1, INPUTS // len(TARGETS)),
        derandomize="MLOMAE_FUZZ" not in os.environ,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
    )
    @given(broken(bases))
    def read(content: bytes) -> None:
        folder.mkdir()
        try:
            with watched(folder):
                target.read(content, folder)
        finally:
            shutil.rmtree(folder)

    read()


def test_the_watch_sees_what_is_forbidden(tmp_path: Path) -> None:
    inside, outside = tmp_path / "inside", tmp_path.parent / "outside"
    for act, told in (
        (lambda: outside.write_text(""), "outside of the run directory"),
        (lambda: inside.rename(outside), "outside of the run directory"),
        (lambda: os.system("true"), r"os\.system"),
    ):
        with pytest.raises(AssertionError, match=told), watched(tmp_path):
            inside.write_text("")
            act()
    assert not outside.exists()


def test_the_watch_cannot_be_silenced(tmp_path: Path) -> None:
    """By readers that take every error for a damaged input."""
    with pytest.raises(AssertionError, match=r"os\.system"), watched(tmp_path), suppress(Exception):
        os.system("true")
    with pytest.raises(AssertionError, match="no end"), watched(tmp_path, patience=1), suppress(Exception):
        time.sleep(10)
