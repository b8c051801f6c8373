"""Nothing asks the network for anything, unless a configuration names an address."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.architecture.source_tree import python_files
from tests.integration.tiny import write_recipe

ASKED = 99
# Ends the process at once: a caller might take an exception for a network that is down, and go on.
_WATCH = f"""
import os, socket, sys

def watch(event, arguments):
    asks = event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request")
    if asks or event == "socket.connect" and arguments[0].family != socket.AF_UNIX:
        os.write(2, f"asked the network: {{event}} {{arguments}}".encode())
        os._exit({ASKED})

sys.addaudithook(watch)
"""
_COMMAND = f"{_WATCH}\nfrom mlomae.cli import main\nsys.exit(main(sys.argv[1:]))"


def _run(code: str, *words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=folder, capture_output=True, text=True, timeout=600
    )


def test_the_watch_sees_a_request(tmp_path: Path) -> None:
    code = f"{_WATCH}\nimport urllib.request\nurllib.request.urlopen('http://localhost:9')"
    assert _run(code, folder=tmp_path).returncode == ASKED


def test_imports_ask_for_nothing(tmp_path: Path) -> None:
    modules = [
        ".".join(path.with_suffix("").parts).removeprefix("kernels.").removesuffix(".__init__")
        for path in python_files("mlomae", "kernels")
        if path.name != "__main__.py"
    ]
    assert len(modules) > 100
    code = f"{_WATCH}\nfrom importlib import import_module\nfor name in {modules}: import_module(name)"
    done = _run(code, folder=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_run_its_evaluation_and_its_export_ask_for_nothing(tmp_path: Path) -> None:
    fields = {"data.test_fraction": 0.8, "data.heldout_fraction": 0.5, "loggers": ["tensorboard"]}
    recipe = write_recipe(tmp_path / "tiny.yaml", fields)
    for words in (
        ["train", "--config", str(recipe), "--run-dir", "run", "--quiet"],
        ["eval", "knn", "run"],
        ["report", "run"],
        ["export", "run", "--to", "timm", "--out", "exported"],
        ["plan", "--config", str(recipe)],
    ):
        done = _run(_COMMAND, *words, folder=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "run" / "report.html").exists()


def test_help_asks_for_nothing(tmp_path: Path) -> None:
    code = (
        f"{_WATCH}\nfrom mlomae.cli import COMMANDS, main\n"
        "for name in COMMANDS:\n"
        "    try:\n        main([name, '--help'])\n"
        "    except SystemExit as end:\n        assert not end.code\n"
    )
    assert _run(code, folder=tmp_path).returncode == 0
