"""Scalars, images and the configuration reach every logger, as its own reader finds them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mlomae import loggers
from mlomae.config import Config
from mlomae.errors import UserError
from mlomae.loggers import open_loggers
from mlomae.metrics import MetricsWriter
from mlomae.run_dir import RunDir
from mlomae.sections import LoggerName

PIXELS = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)


def write(folder: Path, logger: LoggerName, first_step: int, last_step: int) -> dict[str, Any]:
    """A run of 4 steps, from one to another; its configuration."""
    config = Config(seed=7, loggers=(logger,), display="quiet")
    run_dir = RunDir(folder, config)
    folder.mkdir(exist_ok=True)
    Image.fromarray(PIXELS).save(run_dir.picture)
    writer = MetricsWriter(run_dir, config, True, 4, first_step, {})
    for step in range(first_step + 1, last_step + 1):
        writer.log(step, {"loss/pretrain": step / 2, "loss/mask": float("nan")})
        if step % 2 == 0:
            writer.image(step, run_dir.picture)
    if last_step == 4:
        writer.result({"knn_accuracy": 0.75})
    writer.close()
    return config.model_dump(mode="json")


def test_tensorboard(tmp_path: Path) -> None:
    config = write(tmp_path, "tensorboard", 0, 4)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss/pretrain")] == [
        (step, step / 2) for step in range(1, 5)
    ]
    assert [event.step for event in events.Images("mask")] == [2, 4]
    (text,) = events.Tensors("config/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert yaml.safe_load(shown.removeprefix("```yaml\n").removesuffix("```")) == config


def test_weights_and_biases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed: pip install 'mlomae[wandb]'")
    from tests.run.wandb_file import read

    monkeypatch.setenv("WANDB_MODE", "offline")
    config = write(tmp_path / "x", "wandb", 0, 2)
    write(tmp_path / "x", "wandb", 1, 4)
    first, second = (read(path) for path in sorted((tmp_path / "x" / "wandb").glob("offline-run-*/*.wandb")))
    assert first.id == second.id
    assert (second.name, second.project) == ("x", "mlomae")
    assert {name: first.config[name] for name in config} == config
    assert [(line["step"], line["loss/pretrain"]) for line in second.history if "loss/pretrain" in line] == [
        (step, step / 2) for step in (2, 3, 4)
    ]
    pictures = [line for line in second.history if "mask.path" in line]
    assert [(line["step"], line["mask.width"], line["mask.height"]) for line in pictures] == [
        (2, 7, 5),
        (4, 7, 5),
    ]
    (file,) = (tmp_path / "x" / "wandb").glob(f"offline-run-*/files/{pictures[1]['mask.path']}")
    with Image.open(file) as picture:
        assert np.array_equal(np.asarray(picture), PIXELS)
    assert second.history[-1]["result/knn_accuracy"] == 0.75
    assert (first.exit_code, second.exit_code) == (1, 0)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an MLflow server."""
    pytest.importorskip("mlflow.server", reason="mlflow is not installed: pip install 'mlomae[mlflow]'")
    folder = tmp_path_factory.mktemp("mlflow")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={port}", "--workers=1"]
    command += [f"--backend-store-uri=sqlite:///{folder}/runs.db", f"--artifacts-destination={folder}/files"]
    address = f"http://127.0.0.1:{port}"
    log = folder / "log"
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, cwd=folder, start_new_session=True)
    try:
        deadline = time.monotonic() + 180
        while not _answers(address):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.2)
        yield address
    finally:
        os.killpg(process.pid, 9)
        process.wait()


def _answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.dist
def test_mlflow(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    from mlflow import MlflowClient

    config = write(tmp_path / "x", "mlflow", 0, 2)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("mlomae")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == ("x", "KILLED")
    write(tmp_path / "x", "mlflow", 2, 4)
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    found = [(line.step, line.value) for line in client.get_metric_history(run.info.run_id, "loss/pretrain")]
    assert sorted(found) == [(step, step / 2) for step in range(1, 5)]
    assert run.data.metrics["result/knn_accuracy"] == 0.75
    assert (run.data.params["seed"], run.data.params["model.patch_size"]) == ("7", "16")
    kept = client.download_artifacts(run.info.run_id, "config.yaml", str(tmp_path))
    assert yaml.safe_load(Path(kept).read_text()) == config
    pictures = [file.path for file in client.list_artifacts(run.info.run_id, "images")]
    assert len([path for path in pictures if path.endswith(".png")]) == 2


@pytest.mark.slow
@pytest.mark.dist
def test_lost_server_does_not_end_a_run(
    tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (logger,) = open_loggers(["mlflow"], tmp_path, {}, 0)
    # The run that it writes to is gone, as after a restart of a server without a disk.
    logger._logger._id = "0" * 32  # type: ignore[attr-defined]
    for step in range(3):
        logger.scalars(step, {"loss": 1.0})
    logger.close(finished=True)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("mlomae:")]
    assert line.startswith("mlomae: mlflow: ") and line.endswith("; the run goes on without it")


class Slow:
    """A logger that takes nothing before it is let go."""

    def __init__(self, *_: object) -> None:
        self.go, self.taken = threading.Event(), list[int]()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.go.wait()
        self.taken.append(step)

    def image(self, step: int, name: str, png: bytes) -> None: ...

    def close(self, finished: bool) -> None:
        self.taken.append(-1)


def test_a_slow_server_holds_neither_memory_nor_the_end_of_a_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loggers, "PATIENCE_STOPPED", 0.2)
    monkeypatch.setattr(loggers, "WAITING", 4)
    for steps, told in ((2, "does not take the rest within 0.2 s"), (8, "4 lines wait for it")):
        slow = Slow()
        aside = loggers._Aside("x", slow)
        for step in range(steps):
            aside.scalars(step, {})
        aside.close(finished=False)
        assert capsys.readouterr().err == f"mlomae: x: {told}; the run goes on without it\n"
        slow.go.set()
    monkeypatch.setattr(loggers, "WAITING", 5)
    patient = Slow()
    patient.go.set()
    aside = loggers._Aside("x", patient)
    for step in range(3):
        aside.scalars(step, {})
    aside.close(finished=True)
    assert patient.taken == [0, 1, 2, -1] and capsys.readouterr().err == ""


def test_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"^loggers: wandb: .*is missing; pip install 'mlomae\[wandb\]'$"):
        open_loggers(["tensorboard", "wandb"], tmp_path, {}, 0)


def test_unreachable_service_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed: pip install 'mlomae[mlflow]'")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"^loggers: mlflow: .*127\.0\.0\.1.*; without it: --loggers tensorb"):
        open_loggers(["mlflow"], tmp_path, {}, 0)


@pytest.mark.parametrize(
    ("given", "found"),
    [("tensorboard, wandb", ("tensorboard", "wandb")), (["mlflow"], ("mlflow",)), ([], ())],
)
def test_names_in_a_configuration(given: Any, found: tuple[str, ...]) -> None:
    assert Config(loggers=given).loggers == found


def test_without_loggers_the_run_has_its_own_files(tmp_path: Path) -> None:
    assert open_loggers([], tmp_path, {}, 0) == []
    assert list(tmp_path.iterdir()) == []
