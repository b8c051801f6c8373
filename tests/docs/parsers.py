"""Parsers of the programs whose documented commands cannot run here, each given the words of a command."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

Words = list[str]


def train(words: Words) -> None:
    """``mlomae train``: resolves the configuration, and holds it to the DeepSpeed configuration."""
    from mlomae.distributed.ds_config import check_combination, load_ds_config
    from mlomae.train_command import parse

    config, ds_path = parse(words)
    check_combination(config, None if ds_path is None else load_ds_config(ds_path))


def torchrun(words: Words) -> None:
    from torch.distributed.run import get_args_parser

    known = get_args_parser().parse_args(words[1:])
    _program([known.training_script, *known.training_script_args], known.module)


def deepspeed(words: Words) -> None:
    from deepspeed.launcher.runner import fetch_hostfile, parse_args

    known: Namespace = parse_args(words[1:])
    if known.hostfile in words:
        assert fetch_hostfile(known.hostfile), f"{known.hostfile} names no hosts"
    _program([known.user_script, *known.user_args], known.module)


def sbatch(words: Words) -> None:
    """Options that sbatch has where it is installed, a job script, and arguments of ``mlomae train``."""
    script = next(number for number, word in enumerate(words) if word.endswith(".sbatch"))
    if shutil.which("sbatch"):
        # Its help alone needs a configuration.
        Path("slurm.conf").write_text("ClusterName=none\nSlurmctldHost=localhost\n")
        environment = {**os.environ, "SLURM_CONF": str(Path("slurm.conf").resolve())}
        known = subprocess.check_output(["sbatch", "--help"], env=environment, text=True)
        for option in (word.partition("=")[0] for word in words[1:script] if word.startswith("--")):
            assert re.search(rf"{option}\b", known), f"sbatch has no option {option}"
    _check_syntax(words[script])
    arguments = words[script + 1 :]
    if words[script].endswith("sweep.sbatch"):
        from mlomae.slurm.submit import read_sweep

        lines, _, *arguments = arguments
        read_sweep(Path(lines))
    train(arguments)


def script(words: Words) -> None:
    (path,) = words
    _check_syntax(path)


def venv(words: Words) -> None:
    """Makes the environment beside the one that is there."""
    _, *options, target = words
    subprocess.run([sys.executable, *options, "--without-pip", f"{target}-of-test"], check=True)


def pip_install(words: Words) -> None:
    """pip's own options; files of requirements are there, and extras are the project's."""
    from pip._internal.commands import create_command

    options, requirements = create_command("install").parse_args(words[words.index("install") + 1 :])
    assert requirements or options.editables or options.requirements
    assert all(Path(file).is_file() for file in options.requirements)
    for target in (*options.editables, *requirements):
        if found := re.fullmatch(r"(?:\.|mlomae)\[([\w,-]+)\]", target):
            extras = Path("setup.py").read_text().partition("extras_require")[2]
            assert all(f'"{extra}":' in extras for extra in found[1].split(",")), f"{target}: no such extra"


def build(words: Words) -> None:
    from build.__main__ import main_parser

    main_parser().parse_args(words[3:])


def mypy(words: Words) -> None:
    from mypy.main import process_options

    sources, _ = process_options(words[1:])
    assert sources


def shards(words: Words) -> None:
    from mlomae.sharding.command import _parser

    _parser().parse_args(words[2:])


def gpu(words: Words) -> None:
    from benchmarks.gpu import _options

    _options(words[2:])


def peer(words: Words) -> None:
    """The options of a peer's process, whose module exists; betty-ml need not be there."""
    from benchmarks.peers import measure

    module = words[words.index("-m") + 1]
    assert Path(f"{module.replace('.', '/')}.py").exists()
    with _parse_only(words[words.index(module) :]):
        measure.main("betty", build=None)  # type: ignore[arg-type]


def _program(words: Words, module: bool) -> None:
    """What a launcher starts: ``train.py …``, or ``-m mlomae train …``."""
    name, *arguments = words
    if module:
        assert name == "mlomae" and arguments[0] == "train", f"a module to check by hand: {words}"
        arguments = arguments[1:]
    else:
        assert Path(name).name == "train.py" and Path(name).exists(), f"there is no {name}"
    train(arguments)


def _check_syntax(path: str) -> None:
    subprocess.run(["bash", "-n", path], check=True)


class _Parsed(Exception):
    """The words have been parsed."""


@contextmanager
def _parse_only(words: Words) -> Iterator[None]:
    """Ends the program in this block where it has parsed ``words``."""
    parse = ArgumentParser.parse_args

    def stop(self: ArgumentParser) -> None:
        parse(self)
        raise _Parsed

    with (
        mock.patch.object(sys, "argv", words),
        mock.patch.object(ArgumentParser, "parse_args", stop),
        pytest.raises(_Parsed),
    ):
        yield
