"""Where a run's scalars, images and configuration go beside its own files: TensorBoard, W&B, MLflow.

Project, server and mode are those of the libraries' own environment variables (``WANDB_PROJECT``,
``WANDB_MODE``, ``MLFLOW_TRACKING_URI``, ``MLFLOW_EXPERIMENT_NAME``).
"""

from __future__ import annotations

import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
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
    def __init__(self, folder: Path, config: Mapping[str, Any], first_step: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary  # type: ignore[import-untyped]
        from torch.utils.tensorboard import SummaryWriter

        self._summary = Summary
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step + 1)
        self._events: Any = self._writer.file_writer
        text = yaml.safe_dump(dict(config), sort_keys=False)
        self._writer.add_text("config", f"```yaml\n{text}```", first_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        # A killed run is continued from a checkpoint: events up to it must have reached the file.
        self._writer.flush()

    def image(self, step: int, name: str, png: bytes) -> None:
        # The writer's own ``add_image`` takes pixels, makes three copies in float32 and encodes them again.
        width, height = _decode(png).size
        image = self._summary.Image(width=width, height=height, colorspace=_RGB, encoded_image_string=png)
        value = self._summary.Value(tag=name, image=image)
        self._events.add_summary(self._summary(value=[value]), step)

    def close(self, finished: bool) -> None:
        self._writer.close()


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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"mlomae-{name}")
        self._lost = False

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._later(self._logger.scalars, step, dict(values))

    def image(self, step: int, name: str, png: bytes) -> None:
        self._later(self._logger.image, step, name, png)

    def close(self, finished: bool) -> None:
        self._later(self._logger.close, finished)
        self._thread.shutdown()

    def _later(self, call: Callable[..., None], *arguments: Any) -> None:
        self._thread.submit(self._try, call, *arguments)

    def _try(self, call: Callable[..., None], *arguments: Any) -> None:
        if self._lost:
            return
        try:
            call(*arguments)
        except Exception as error:
            self._lost = True
            print(f"mlomae: {self._name}: {_line(error)}; the run goes on without it", file=sys.stderr)


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
