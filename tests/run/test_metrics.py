"""Metrics reach the file, TensorBoard and the screen once per step, also across a resume."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlomae.config import Config
from mlomae.metrics import MetricsWriter
from mlomae.progress import Show
from mlomae.run_dir import RunDir
from mlomae.sections import Display

SHOW: Show = {
    "loss": {"loss/pretrain": "pretrain {:.4f}".format, "loss/mask": "mask {:.2f}".format},
    "machine": {"images_per_s": "{:.0f} img/s".format},
}
CONFIG = Config()


@pytest.fixture
def run_dir(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path, CONFIG)


def write(run_dir: RunDir, first_step: int, last_step: int, offset: float = 0.0) -> None:
    writer = MetricsWriter(run_dir, CONFIG, enabled=True, total=40, first_step=first_step, show=SHOW)
    for step in range(first_step + 1, last_step + 1):
        writer.log(step, {"loss/pretrain": step + offset})
    writer.close()


def lines(run_dir: RunDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]


def events(run_dir: RunDir) -> EventAccumulator:
    return EventAccumulator(str(run_dir.tensorboard)).Reload()


def test_one_line_per_step_with_scalars_and_arrays(run_dir: RunDir) -> None:
    writer = MetricsWriter(run_dir, CONFIG, enabled=True, total=40, first_step=0, show=SHOW)
    writer.log(
        10, {"loss/pretrain": 0.1 + 0.2, "loss/mask": float("nan")}, {"frequency": [0.5, float("inf")]}
    )
    line = {"step": 10, "loss/pretrain": 0.1 + 0.2, "loss/mask": None, "frequency": [0.5, None]}
    assert lines(run_dir) == [line]  # already there, before close
    writer.close()


def test_disabled_writer_leaves_nothing(run_dir: RunDir, capsys: pytest.CaptureFixture[str]) -> None:
    writer = MetricsWriter(run_dir, CONFIG, enabled=False, total=40, first_step=0, show=SHOW)
    writer.log(10, {"loss/pretrain": 1.0})
    writer.image(10, run_dir.picture)
    writer.close()
    assert list(run_dir.path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_resume_replaces_what_was_written_after_the_checkpoint(run_dir: RunDir) -> None:
    write(run_dir, 0, 5)
    with open(run_dir.metrics, "a") as file:
        file.write('{"step": 6, "loss/pre')  # the process was killed here
    write(run_dir, 3, 6, offset=0.5)
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.5), (5, 5.5), (6, 6.5)]
    assert [(line["step"], line["loss/pretrain"]) for line in lines(run_dir)] == expected
    assert [(event.step, event.value) for event in events(run_dir).Scalars("loss/pretrain")] == expected


def test_run_that_starts_over_starts_empty(run_dir: RunDir) -> None:
    write(run_dir, 0, 2)
    write(run_dir, 0, 1, offset=0.5)
    assert lines(run_dir) == [{"step": 1, "loss/pretrain": 1.5}]


def test_picture_reaches_tensorboard_unchanged(run_dir: RunDir) -> None:
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    Image.fromarray(pixels).save(run_dir.picture)
    writer = MetricsWriter(run_dir, CONFIG, enabled=True, total=40, first_step=0, show=SHOW)
    writer.image(20, run_dir.picture)
    writer.close()
    (event,) = events(run_dir).Images("mask")
    (run_dir.path / "read.png").write_bytes(event.encoded_image_string)
    with Image.open(run_dir.path / "read.png") as picture:
        assert np.array_equal(np.asarray(picture), pixels)
    assert event.step == 20


def test_plain_lines_without_a_terminal(
    run_dir: RunDir, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([100.0, 110.0, 115.0, 4000.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    writer = MetricsWriter(run_dir, CONFIG, enabled=True, total=40, first_step=20, show=SHOW)
    writer.log(25, {"images_per_s": 3120.4, "loss/pretrain": 0.51234, "entropy": 1.0})
    writer.log(30, {"loss/pretrain": 0.5, "loss/mask": float("nan")})
    writer.log(31, {})
    monkeypatch.undo()
    writer.close()
    assert capsys.readouterr().out.splitlines() == [
        "step 25/40  pretrain 0.5123  3120 img/s  eta 0:30",
        "step 30/40  pretrain 0.5000  mask nan  eta 0:15",
        "step 31/40  eta 53:11",
    ]


@pytest.mark.parametrize("display", ["quiet", "json"])
def test_what_else_can_be_shown(
    run_dir: RunDir, capsys: pytest.CaptureFixture[str], display: Display
) -> None:
    writer = MetricsWriter(run_dir, Config(display=display), enabled=True, total=40, first_step=0, show=SHOW)
    writer.log(10, {"loss/pretrain": 0.5, "loss/mask": float("nan"), "entropy": 1.0})
    writer.close()
    line = {"step": 10, "total": 40, "loss/pretrain": 0.5, "loss/mask": None, "entropy": 1.0}
    output = [json.loads(text) for text in capsys.readouterr().out.splitlines()]
    assert output == ([line] if display == "json" else [])


def test_final_figures_reach_the_loggers_only(run_dir: RunDir) -> None:
    writer = MetricsWriter(run_dir, CONFIG, enabled=True, total=40, first_step=0, show=SHOW)
    writer.log(40, {"loss/pretrain": 0.5})
    writer.result({"knn_accuracy": 0.75, "policy": "learned", "confusion": [1, 2], "ok": True})
    writer.close()
    tags = [tag for tag in events(run_dir).Tags()["scalars"] if tag.startswith("result/")]
    assert tags == ["result/knn_accuracy"]
    assert [(event.step, event.value) for event in events(run_dir).Scalars(tags[0])] == [(40, 0.75)]
    assert len(lines(run_dir)) == 1


def test_view_on_a_terminal(tmp_path: Path) -> None:
    program = (
        "from mlomae.logbook import SHOWN\n"
        "from mlomae.progress import Progress\n"
        "view = Progress(4, 0, SHOWN)\n"
        "view.log(2, {'loss/pretrain': 0.125, 'hypergradient/norm': 3e-3, 'mask/entropy': 0.5,\n"
        "             'memory/peak_bytes': 3 * 2**29})\n"
        "view.log(3, {'loss/pretrain': 0.25})\n"
        "print('a warning')\n"
        "view.close()\n"
    )
    output = on_a_terminal(program)
    assert "\x1b[" in output
    text = [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output).splitlines()]
    last = max(number for number, line in enumerate(text) if "step 3/4" in line)
    assert re.match(r"step 3/4 .* eta \d+:\d\d$", text[last])
    assert [line.split(maxsplit=1) for line in text[last + 1 : last + 5]] == [
        ["loss", "pretrain 0.2500"],
        ["gradient", "hypergradient 3.0e-03"],
        ["mask", "entropy 0.500"],
        ["machine", "1.5 GiB"],
    ]
    assert "a warning" in text


def test_no_color_leaves_colours_out_of_the_view() -> None:
    program = "from mlomae.progress import Progress; p = Progress(2, 0, {}); p.log(1, {}); p.close()"
    colour = re.compile(r"\x1b\[[0-9;]*[39][0-9][0-9;]*m")
    assert colour.search(on_a_terminal(program))
    assert not colour.search(on_a_terminal(program, NO_COLOR="1"))


def on_a_terminal(program: str, **variables: str) -> str:
    """What a program writes to a terminal of 80 columns."""
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != "NO_COLOR"}
    environment |= {"TERM": "xterm", "COLUMNS": "80", **variables}
    command = [sys.executable, "-c", program]
    subprocess.run(command, stdout=theirs, check=True, env=environment, timeout=60)
    os.close(theirs)
    output = os.read(ours, 100_000).decode()
    os.close(ours)
    return output
