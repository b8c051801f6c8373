"""The folder that receives everything a run leaves: who may use it, and how files get into it.

* ``config.yaml``: the resolved configuration; its presence makes a folder a run directory
* ``metrics.jsonl``: one line per log interval
* ``tensorboard/``, ``wandb/``, ``loggers.json``: the same for others (``mlomae.loggers``)
* ``checkpoints/``: see ``mlomae.checkpoint``
* ``mask.png``, ``pictures.jsonl``, ``pictures.safetensors``: see ``mlomae.pictures``
* ``environment.json``: versions and device of the last process
* ``encoder.safetensors``: the encoder of the newest checkpoint, as a timm state dict
* ``attempts.jsonl``: the attempts of a Slurm job, if it is one (``mlomae.slurm.requeue``)
* ``bad_samples.jsonl``: images that could not be used, if there were any
* ``result.json``: the final evaluation; its presence means that the run is complete
"""

from __future__ import annotations

import enum
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import yaml

from mlomae.config import RESUMABLE_CHANGES, dump_config, flatten
from mlomae.errors import UserError
from mlomae.sections import Section


class Status(enum.Enum):
    """What a run directory holds when it is claimed."""

    NEW = "new"
    RESUME = "resume"
    COMPLETE = "complete"


class RunDir:
    """One run directory and the configuration of the run that wants it.

    Args:
        config: every field has a default.
        resumable: names of the fields that may change when the run is resumed.
        field: of the configuration that names the folder, for messages.
    """

    def __init__(
        self,
        path: Path,
        config: Section,
        resumable: Collection[str] = RESUMABLE_CHANGES,
        field: str = "run_dir",
    ) -> None:
        self.path = path
        self._field = field
        self._config_text = dump_config(config)
        self._defaults = dump_config(type(config)())
        self._resumable = resumable
        self._lock: TextIO | None = None

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.path / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def picture(self) -> Path:
        return self.path / "mask.png"

    @property
    def pictures(self) -> Path:
        return self.path / "pictures.jsonl"

    @property
    def latest_picture(self) -> Path:
        return self.path / "pictures.safetensors"

    @property
    def environment(self) -> Path:
        return self.path / "environment.json"

    @property
    def bad_samples(self) -> Path:
        return self.path / "bad_samples.jsonl"

    @property
    def result(self) -> Path:
        return self.path / "result.json"

    def claim(self, primary: bool, wait: float = 0.0) -> Status:
        """Checks that the directory is free for this run; the primary rank also creates and locks it.

        Other ranks only read. The status does not depend on the order in which ranks ask: claiming
        leaves neither a checkpoint nor a result.

        Args:
            primary: whether this is the rank that writes.
            wait: seconds for another process to let go of the directory.

        Returns:
            COMPLETE if there is a result, else RESUME if there is a checkpoint, else NEW.

        Raises:
            UserError: the folder holds a different run or something else, or another live process
                has claimed it. Nothing has been written then.
        """
        self._check_contents()
        if primary:
            self._acquire(wait)
            self._check_contents()  # again, now that nobody else can change them
            if not self.config.exists():
                write_atomically(self.config, self._config_text.encode())
        if self.result.exists():
            return Status.COMPLETE
        return Status.RESUME if any(self.checkpoints.glob("step-*")) else Status.NEW

    def release(self) -> None:
        """Lets another RunDir claim the directory; the end of the process does the same."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def write_result(self, result: Mapping[str, Any]) -> None:
        """Writes result.json, which marks the run as complete. Non-finite numbers become null."""
        write_atomically(self.result, (to_json(result, indent=2) + "\n").encode())

    def read_result(self) -> dict[str, Any]:
        """The content of result.json of a complete run."""
        result: dict[str, Any] = json.loads(self.result.read_text())
        return result

    def _check_contents(self) -> None:
        try:
            names = {entry.name for entry in self.path.iterdir()}
        except FileNotFoundError:
            return
        except OSError as error:
            raise self._refusal(f"cannot be read ({error.strerror})") from None
        if "config.yaml" in names:
            self._compare_configs()
        # The lock and the temporary file may be all that a process killed during its claim left.
        elif names - {".lock", temporary_for(self.config).name}:
            raise self._refusal("is not empty and not a run directory (no config.yaml); choose another one")

    def _compare_configs(self) -> None:
        try:
            there = yaml.safe_load(self.config.read_text())
        except (OSError, yaml.YAMLError, UnicodeDecodeError):
            there = None
        if not isinstance(there, dict):
            raise self._refusal(f"config.yaml is damaged; choose another {self._field} or delete it")
        # A field that is newer than the run had its default.
        before = {**flatten(yaml.safe_load(self._defaults)), **flatten(there)}
        now = flatten(yaml.safe_load(self._config_text))
        differences = [
            f"{name} is {before.get(name, 'absent')} there, {now.get(name, 'absent')} asked for"
            for name in [*now, *(before.keys() - now.keys())]
            if name not in self._resumable and before.get(name) != now.get(name)
        ]
        if differences:
            found = f"holds a different run ({first_few(differences)})"
            raise self._refusal(f"{found}; choose another {self._field} or delete it")

    def _acquire(self, wait: float) -> None:
        if self._lock is not None:
            return
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "a+")  # noqa: SIM115 - held until the process ends
        except OSError as error:
            raise self._refusal(f"cannot be written ({error.strerror})") from None
        deadline = time.monotonic() + wait
        try:
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        raise
                    time.sleep(0.5)
        except OSError as error:
            lock.seek(0)
            owner = lock.read().strip()
            lock.close()
            if isinstance(error, BlockingIOError):
                reason = f"is in use by another process ({owner}); wait for it or choose another one"
            else:
                reason = f"cannot be locked ({error.strerror}); choose one on a file system with locks"
            raise self._refusal(reason) from None
        lock.truncate(0)
        lock.write(f"pid {os.getpid()} on {os.uname().nodename}\n")
        lock.flush()
        # Loader processes must not keep the directory locked when this process is killed.
        os.register_at_fork(after_in_child=lock.close)
        self._lock = lock

    def _refusal(self, reason: str) -> UserError:
        return UserError(f"{self._field} {self.path}: {reason}")


def write_atomically(path: Path, content: bytes) -> None:
    """Replaces ``path`` in one step: a reader, or a crash, sees the old or the new file, never a part."""
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def link_atomically(source: Path, path: Path) -> None:
    """Replaces ``path`` in one step by the file ``source``, which must be on the disk.

    Both share its content where the file system has hard links, else it is copied.
    """
    with replacing(path) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            sync(temporary)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A new file to write and sync inside the context; at its end it replaces ``path`` in one step.

    If the context raises, ``path`` is as it was.
    """
    temporary = temporary_for(path)
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # replacing a file by a link to itself leaves both names
    sync(path.parent)


def temporary_for(path: Path) -> Path:
    """Where the new content of ``path`` is prepared; overwritten if a crash left it."""
    return path.with_name(f".{path.name}.tmp")


def sync(path: Path) -> None:
    """Forces a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def to_json(value: Any, indent: int | None = None) -> str:
    """Strict JSON text; NaN and infinities, which JSON does not have, become null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def first_few(problems: Sequence[str]) -> str:
    """At most three problems on one line, and how many more there are."""
    more = len(problems) - 3
    return "; ".join([*problems[:3], *([f"and {more} more"] if more > 0 else [])])


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
