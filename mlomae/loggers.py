"""Where a run's scalars, images and configuration go beside its own files: TensorBoard, W&B, MLflow.

Project, server and mode are those of the libraries' own environment variables (``WANDB_PROJECT``,
``WANDB_MODE``, ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``).
"""

from __future__ import annotations

import io
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import Full, Queue
from typing import Any, Protocol

import yaml
from PIL import Image

from mlomae.config import flatten
from mlomae.errors import UserError
from mlomae.run_dir import to_json, write_atomically
from mlomae.sections import LoggerName

_NAME = "mlomae"  # of the project or experiment, unless the environment names one
_MLFLOW_LONGEST = 6000  # characters of a parameter
_RGB = 3  # TensorBoard's number of the colour space
# Of a logger in a thread: calls that may wait, and seconds for which the end of a run waits for them; a run
# that was asked to stop has to be gone soon.
WAITING, PATIENCE, PATIENCE_STOPPED = 1000, 600.0, 20.0


class Logger(Protocol):
    """One place. Steps may come again when a run was resumed from an earlier checkpoint."""

    def scalars(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, png: bytes) -> None:
        """``png``: the content of a PNG file."""

    def close(self, finished: bool) -> None: ...


def open_loggers(
    names: Sequence[LoggerName], folder: Path, config: Mapping[str, Any], first_step: int
) -> list[Logger]:
    """The loggers of a run, in their order.

    Args:
        folder: of the run. Its name becomes that of the run; what is needed to go on with the same run
            when this one is resumed is left in ``loggers.json``.
        config: the resolved configuration, as a tree.
        first_step: steps done before.

    Raises:
        UserError: a package is missing, or its service refuses the run.
    """
    opened: list[Logger] = []
    try:
        for name in names:
            opened.append(_OPEN[name](folder, config, first_step))
    except ImportError as error:
        remedy = f"pip install 'mlomae[{name}]'" if name != "tensorboard" else "pip install tensorboard"
        _close(opened)
        raise UserError(f"loggers: {name}: {error.name or error} is missing; {remedy}") from None
    except Exception as error:
        # Each library has its own exceptions, and those of its transport.
        _close(opened)
        raise UserError(f"loggers: {name}: {_line(error)}; without it: --loggers tensorboard") from error
    return opened


class _TensorBoard:
    """Writes events at once: the library's writer does it in a thread, whose errors are tracebacks."""

    def __init__(self, folder: Path, config: Mapping[str, Any], first_step: int) -> None:
        from tensorboard.compat.proto import event_pb2, summary_pb2  # type: ignore[import-untyped]
        from tensorboard.summary.writer.record_writer import RecordWriter  # type: ignore[import-untyped]
        from torch.utils.tensorboard.summary import text

        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        place = folder / "tensorboard"
        place.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(place / name, "xb")  # noqa: SIM115 - open for the whole run
        self._records = RecordWriter(self._file)
        self._write(file_version="brain.Event:2")
        # What an earlier process wrote about steps that run again is not shown.
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=first_step + 1, session_log=start)
        document = yaml.safe_dump(dict(config), sort_keys=False)
        self._write(step=first_step, summary=text("config", f"```yaml\n{document}```"))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        named = [self._summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=self._summary(value=named))

    def image(self, step: int, name: str, png: bytes) -> None:
        width, height = _decode(png).size
        image = self._summary.Image(width=width, height=height, colorspace=_RGB, encoded_image_string=png)
        self._write(step=step, summary=self._summary(value=[self._summary.Value(tag=name, image=image)]))

    def close(self, finished: bool) -> None:
        self._file.close()

    def _write(self, **event: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **event).SerializeToString())
        # A killed run is continued from a checkpoint: events up to it must have reached the file.
        self._file.flush()


class _Wandb:
    def __init__(self, folder: Path, config: Mapping[str, Any], first_step: int) -> None:
        import wandb

        known = _ids(folder).get("wandb")
        self._image = wandb.Image
        self._run = wandb.init(
            dir=folder,
            project=os.environ.get("WANDB_PROJECT", _NAME),
            name=folder.name,
            id=known,
            resume="allow",
            config=dict(config),
            # The screen stays the run's own; wandb would record the live view's control codes.
            settings=wandb.Settings(console="off", silent=True),
        )
        _keep_id(folder, "wandb", self._run.id)
        # Its own counter only grows, while ours starts again at the checkpoint.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({"step": step, **values})

    def image(self, step: int, name: str, png: bytes) -> None:
        self._run.log({"step": step, name: self._image(_decode(png))})

    def close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class _MLflow:
    def __init__(self, folder: Path, config: Mapping[str, Any], first_step: int) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._client, self._metric = MlflowClient(), Metric
        known = _ids(folder).get("mlflow")
        if known is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _NAME)
            found = self._client.get_experiment_by_name(name)
            experiment = self._client.create_experiment(name) if found is None else found.experiment_id
            self._id: str = self._client.create_run(experiment, run_name=folder.name).info.run_id
            _keep_id(folder, "mlflow", self._id)
            fields = flatten(dict(config)).items()
            params = [Param(field, str(value)[:_MLFLOW_LONGEST]) for field, value in fields]
            for start in range(0, len(params), 100):  # as many as a request may have
                self._client.log_batch(self._id, params=params[start : start + 100])
        else:
            self._id = known
            self._client.update_run(known, status="RUNNING")
        self._client.log_dict(self._id, dict(config), "config.yaml")

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        now = round(time.time() * 1000)
        # Databases have no place for others.
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        metrics = [self._metric(name, value, now, step) for name, value in finite.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def image(self, step: int, name: str, png: bytes) -> None:
        self._client.log_image(self._id, _decode(png), key=name, step=step)

    def close(self, finished: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


class _Aside:
    """Another logger in a thread: a slow server does not hold the training, a lost one does not end it."""

    def __init__(self, name: str, logger: Logger) -> None:
        self._name, self._logger = name, logger
        self._waiting: Queue[Callable[[], None] | None] = Queue(WAITING)
        self._lost = False
        # No end of a process waits for it.
        self._thread = threading.Thread(target=self._work, name=f"mlomae-{name}", daemon=True)
        self._thread.start()

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._later(partial(self._logger.scalars, step, dict(values)))

    def image(self, step: int, name: str, png: bytes) -> None:
        self._later(partial(self._logger.image, step, name, png))

    def close(self, finished: bool) -> None:
        self._later(partial(self._logger.close, finished))
        self._later(None)
        patience = PATIENCE if finished else PATIENCE_STOPPED
        if not self._lost:
            self._thread.join(patience)
        if not self._lost and self._thread.is_alive():
            self._give_up(f"does not take the rest within {patience:g} s")

    def _later(self, call: Callable[[], None] | None) -> None:
        try:
            if not self._lost:
                self._waiting.put_nowait(call)
        except Full:
            self._give_up(f"{WAITING} lines wait for it")

    def _work(self) -> None:
        while (call := self._waiting.get()) is not None:
            try:
                call()
            except Exception as error:
                self._give_up(_line(error))
                return

    def _give_up(self, why: str) -> None:
        self._lost = True
        print(f"mlomae: {self._name}: {why}; the run goes on without it", file=sys.stderr)


def _aside(name: str, kind: Callable[..., Logger]) -> Callable[..., Logger]:
    return lambda *arguments: _Aside(name, kind(*arguments))


_OPEN: dict[LoggerName, Callable[..., Logger]] = {
    "tensorboard": _TensorBoard,
    "wandb": _aside("wandb", _Wandb),
    "mlflow": _aside("mlflow", _MLflow),
}


def _close(loggers: Sequence[Logger]) -> None:
    for logger in loggers:
        logger.close(finished=False)


def _ids(folder: Path) -> dict[str, str]:
    try:
        found = json.loads((folder / "loggers.json").read_text())
    except FileNotFoundError:
        return {}
    return dict(found)


def _keep_id(folder: Path, name: str, value: str) -> None:
    write_atomically(folder / "loggers.json", to_json({**_ids(folder), name: value}).encode())


def _decode(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))


def _line(error: BaseException) -> str:
    """The first sentence of a message that may be long."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].rstrip(".")[:200]
