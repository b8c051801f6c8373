"""Where documented commands run: a folder like a clone of the repository, and a shell that starts them.

``mlomae``, ``pytest`` and scripts of Python run in forks of a process that has imported torch already: as
fresh as processes of their own, but ten seconds faster. Everything else goes to bash.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.architecture.source_tree import ROOT

# Seconds for one command, on a busy machine too.
PATIENCE = 600.0
_CLONE = (
    "*.cff", "*.md", "*.py", "LICENSE", "mkdocs.yml", "pyproject.toml", "requirements.txt", ".ci",
    "benchmarks", "docs", "ds_configs", "examples", "kernels", "mlomae", "recipes", "slurm", "tests",
)  # fmt: skip
_LITTER = shutil.ignore_patterns("__pycache__", "*.so")
# Of the launchers' and of pytest's own processes.
_NOT_INHERITED = re.compile(r"RANK|WORLD_SIZE|PYTEST_.*|COLUMNS|MLOMAE_.*")
_IMPORTED = re.compile(
    r"(?P<program>(\.venv/bin/)?(mlomae|pytest|python \w+\.py|python -m mlomae))\b(?P<words>[^|;<>&$`]*)"
    r"(> ?(?P<file>\S+))?"
)


@dataclass(frozen=True)
class Ended:
    """How a command ended, and all that it printed."""

    code: int
    out: str
    err: str


class Workplace:
    """A folder with the files of a clone; its ``.venv`` is the environment of the tests.

    Attributes:
        folder: where commands start.
        home: of the user.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder / "clone", folder / "home"
        self.home.mkdir(parents=True)
        self.folder.mkdir()
        for pattern in _CLONE:
            for path in ROOT.glob(pattern):
                if path.is_dir():
                    shutil.copytree(path, self.folder / path.name, ignore=_LITTER)
                else:
                    shutil.copy(path, self.folder)
        (self.folder / ".venv").symlink_to(sys.prefix)

    @property
    def environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not _NOT_INHERITED.fullmatch(name)}
        programs = os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", os.defpath)])
        return {
            **kept,
            "PATH": programs,
            "HOME": str(self.home),
            # Not the project that the environment was made for, which may be another checkout.
            "PYTHONPATH": str(ROOT),
            "WANDB_MODE": "offline",
            # Nothing that is run here may change the environment, or ask the network.
            "PIP_DRY_RUN": "1",
            "PIP_NO_INDEX": "1",
        }

    def run(self, command: str) -> Ended:
        """Runs one command, or several lines, and waits."""
        found = _IMPORTED.fullmatch(command)
        if found is None:
            return self._bash(command)
        words = [*found["program"].split(), *self.words(found["words"])]
        out, err = self.home.parent / "out", self.home.parent / "err"
        # With the modules that tests/distributed/ranks.py asks for: the first one to ask decides.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["deepspeed", "mlomae.trainer"])
        process = context.Process(target=_become, args=(words, self.folder, self.environment, out, err))
        process.start()
        process.join(PATIENCE)
        process.kill()
        process.join()
        assert process.exitcode is not None
        if found["file"] is not None:
            (target,) = self.words(found["file"])
            shutil.copy(out, self.folder / target)
        return Ended(process.exitcode, out.read_text(), err.read_text())

    def words(self, text: str) -> list[str]:
        """What bash makes of the words of a command: without quotes, with patterns and ~ expanded."""
        done = self._bash(f"printf '%s\\0' {text}")
        assert done.code == 0, done.err
        return done.out.split("\0")[:-1] if text.strip() else []

    def _bash(self, command: str) -> Ended:
        done = subprocess.run(
            ["bash", "-c", command], cwd=self.folder, env=self.environment, timeout=PATIENCE,
            capture_output=True, text=True, errors="replace",
        )  # fmt: skip
        return Ended(done.returncode, done.stdout, done.stderr)


def _become(words: Sequence[str], folder: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    """Turns this process into the program of a command."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for stream, path in ((1, out), (2, err)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream)
        os.close(file)
    import mlomae

    assert Path(mlomae.__file__).is_relative_to(ROOT), f"{mlomae.__file__} is not of {ROOT}"
    program, *rest = words
    if program.endswith("python"):
        program, *rest = rest
        program, rest = ("mlomae", rest[1:]) if program == "-m" else (program, rest)
    sys.argv = [program, *rest]
    if program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    elif program.endswith("pytest"):
        import pytest

        sys.path.insert(0, str(folder))
        sys.exit(pytest.main(rest))
    else:
        from mlomae.cli import main

        sys.exit(main(rest))
