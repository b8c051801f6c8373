"""The direction of imports: each rule keeps one part testable, replaceable or light without the others."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.architecture.source_tree import ROOT, imported_names, is_within, parse, python_files

_PACKAGES = ("mlomae", "kernels/mlomae_kernels")


def _violations(files: list[Path], forbidden: Callable[[str], bool]) -> list[str]:
    return [
        f"{path}:{line} imports {name}"
        for path in files
        for line, name in imported_names(path)
        if forbidden(name)
    ]


def _any_of(*packages: str) -> Callable[[str], bool]:
    return lambda name: any(is_within(name, package) for package in packages)


@pytest.mark.parametrize(
    ("package", "home"),
    [
        ("deepspeed", ("mlomae/distributed/engine.py", "mlomae/distributed/deepspeed_")),
        ("webdataset", ("mlomae/data/",)),
        ("triton", ("kernels/mlomae_kernels/dispatch.py", "kernels/mlomae_kernels/triton_ops/")),
        ("simplejpeg", ("mlomae/data/decoding.py",)),
        ("tensorboard", ("mlomae/loggers.py",)),
        ("pycocotools", ("mlomae/downstream/average_precision.py",)),
        ("onnxruntime", ("mlomae/interop/traced.py",)),
        ("transformers", ()),
        ("pynvml", ("mlomae/nvml.py",)),
        ("torch.utils.tensorboard", ("mlomae/loggers.py",)),
        ("wandb", ("mlomae/loggers.py",)),
        ("mlflow", ("mlomae/loggers.py",)),
    ],
)
def test_third_party_package_has_one_home(package: str, home: tuple[str, ...]) -> None:
    elsewhere = [path for path in python_files(*_PACKAGES) if not path.as_posix().startswith(home)]
    assert _violations(elsewhere, _any_of(package)) == []


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("mlomae/models", ("mlomae.mlo", "mlomae.distributed", "mlomae.data", "mlomae.trainer")),
        ("mlomae/data", ("mlomae.models",)),
        ("mlomae/downstream", ("mlomae.trainer",)),
        ("mlomae/interop", ("mlomae.trainer", "mlomae.downstream.fit")),
        ("kernels/mlomae_kernels", ("mlomae", "deepspeed", "numpy")),
    ],
)
def test_lower_layer_does_not_know_upper_ones(folder: str, forbidden: tuple[str, ...]) -> None:
    assert _violations(python_files(folder), _any_of(*forbidden)) == []


def test_mlo_needs_torch_and_itself_only() -> None:
    allowed = _any_of("torch", "mlomae.mlo", *sys.stdlib_module_names)
    assert _violations(python_files("mlomae/mlo"), lambda name: not allowed(name)) == []


def test_network_and_loss_need_no_configuration() -> None:
    # benchmarks/gpu.py builds a pretraining step where only torch, triton and timm are installed.
    program = (
        "import sys; sys.modules['pydantic'] = None; "
        "import mlomae.models.mae, mlomae.models.selection, mlomae.objectives"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_package_does_not_import_what_is_not_shipped() -> None:
    assert _violations(python_files(*_PACKAGES), _any_of("tests", "benchmarks", "recipes")) == []


def test_nothing_imports_the_source_root_kernels() -> None:
    # A package of that name exists on PyPI; ours is mlomae_kernels.
    assert _violations(python_files(), _any_of("kernels")) == []


def test_kernels_read_the_environment_in_one_place() -> None:
    readers = [
        path.name
        for path in python_files("kernels/mlomae_kernels")
        for node in ast.walk(parse(path))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    ]
    assert set(readers) <= {"dispatch.py"}
