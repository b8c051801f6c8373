"""What is installed, under which names, and what an import costs."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
import torch

import mlomae
from mlomae_kernels._native import native_status
from tests.architecture.source_tree import ROOT, python_files, requirement_lines

_BUILD_INPUTS = ("setup.py", "pyproject.toml", "requirements.txt", "CMakeLists.txt", "LICENSE", "README.md")


def _run_python(code: str, folder: Path) -> str:
    """Standard output of a fresh interpreter started in ``folder``."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_kernels_is_a_source_root_and_no_package() -> None:
    assert (ROOT / "kernels" / "mlomae_kernels" / "__init__.py").exists()
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize("package", ["mlomae", "mlomae_kernels"])
def test_import_is_light(package: str, tmp_path: Path) -> None:
    heavy = (
        "deepspeed",
        "triton",
        "timm",
        "torchvision",
        "sklearn",
        "webdataset",
        "tensorboard",
        "matplotlib",
    )
    code = (
        f"import sys, {package}\n"
        f"loaded = [name for name in {heavy} if name in sys.modules]\n"
        "torch = sys.modules.get('torch')\n"
        "print(loaded, bool(torch and torch.cuda.is_initialized()))"
    )
    assert _run_python(code, tmp_path) == "[] False"


def test_import_loads_no_native_code(tmp_path: Path) -> None:
    code = "import mlomae_kernels, torch; print(sorted(torch.ops.loaded_libraries))"
    assert _run_python(code, tmp_path) == "[]"


def test_version_has_one_home() -> None:
    assert metadata.version("mlomae") == mlomae.__version__
    assert "project" not in tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_command_is_registered() -> None:
    (script,) = metadata.entry_points(group="console_scripts", name="mlomae")
    assert script.value == "mlomae.cli:main"


def test_runtime_dependencies_are_those_of_the_requirements_file() -> None:
    installed = metadata.requires("mlomae") or []
    runtime = {_normal(entry) for entry in installed if "extra ==" not in entry}
    assert runtime == {_normal(line) for line in requirement_lines()}


def _normal(requirement: str) -> str:
    return requirement.replace(" ", "").replace("'", '"')


def _build_wheel(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Builds a copy of the sources into ``folder``; nothing of the build lands in the project."""
    source = folder / "source"
    leave_out = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
    for name in ("mlomae", "kernels", "slurm", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=leave_out)
    for name in _BUILD_INPUTS:
        shutil.copy(ROOT / name, source)
    pip = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    # The CUDA library is built once, by the test of it.
    settings = {**os.environ, "MLOMAE_NO_CUDA": "1", **environment}
    return subprocess.run([*pip, "."], cwd=source, env=settings, capture_output=True, text=True)


def _wheel_names(folder: Path) -> set[str]:
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_wheel_holds_the_two_packages_only(tmp_path: Path) -> None:
    build = _build_wheel(tmp_path)
    assert build.returncode == 0, build.stdout + build.stderr
    names = _wheel_names(tmp_path)
    dist_info = f"mlomae-{mlomae.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"mlomae", "mlomae_kernels", dist_info}
    expected = {path.as_posix().removeprefix("kernels/") for path in python_files("mlomae", "kernels")}
    assert expected | {"mlomae/py.typed", "mlomae_kernels/py.typed"} <= names
    scripts = {f"mlomae/slurm/scripts/{path.name}" for path in (ROOT / "slurm").iterdir()}
    assert scripts == {name for name in names if name.startswith("mlomae/slurm/scripts/")}
    assets = {path.relative_to(ROOT).as_posix() for path in (ROOT / "mlomae" / "report" / "assets").iterdir()}
    assert assets == {name for name in names if name.startswith("mlomae/report/assets/")}
    files = {path.relative_to(ROOT / "recipes").as_posix() for path in (ROOT / "recipes").rglob("*.yaml")}
    recipes = {name for name in names if name.startswith("mlomae/recipes/files/")}
    assert recipes == {f"mlomae/recipes/files/{name}" for name in files}
    # Here as where the tests run: built where it can be, left out where it cannot.
    assert ("mlomae_kernels/_C.so" in names) == native_status().available


@pytest.mark.slow
def test_cuda_library_is_built_without_a_gpu(tmp_path: Path) -> None:
    if shutil.which("nvcc") is None or torch.version.cuda is None:
        pytest.skip("needs nvcc and a CUDA build of torch")
    build = _build_wheel(tmp_path, MLOMAE_NO_CUDA="0", MLOMAE_REQUIRE_CUDA="1", TORCH_CUDA_ARCH_LIST="9.0")
    assert build.returncode == 0, build.stdout + build.stderr
    assert "mlomae_kernels/_C_cuda.so" in _wheel_names(tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    library = zipfile.ZipFile(wheel).extract("mlomae_kernels/_C_cuda.so", tmp_path)
    code = (
        "import torch; from mlomae_kernels._native import CUDA_OPERATORS, native_status\n"
        f"assert native_status().available; torch.ops.load_library({library!r})\n"
        "has = torch._C._dispatch_has_kernel_for_dispatch_key\n"
        "print(all(has(f'mlomae_native::{name}', 'CUDA') for name in CUDA_OPERATORS))"
    )
    assert _run_python(code, tmp_path) == "True"
    # torch's stable ABI only, nothing of its C++ or of Python's: one library for many versions of both.
    symbols = subprocess.run(["nm", "-DC", "--undefined", library], capture_output=True, text=True).stdout
    assert re.findall(r" U ((?:at::|c10::|torch::|Py|_Py)\S*)", symbols) == []
    assert "aoti_torch_get_current_cuda_stream" in symbols


@pytest.mark.slow
def test_broken_cuda_compiler_leaves_the_cpu_library(tmp_path: Path) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    (folder / "nvcc").chmod(0o755)
    path = os.pathsep.join([str(folder), os.environ["PATH"]])
    build = _build_wheel(tmp_path, MLOMAE_NO_CUDA="0", MLOMAE_REQUIRE_NATIVE="0", PATH=path)
    assert build.returncode == 0, build.stdout + build.stderr
    assert "mlomae_kernels/_C_cuda.so" not in _wheel_names(tmp_path)
    assert ("mlomae_kernels/_C.so" in _wheel_names(tmp_path)) == native_status().available


@pytest.mark.slow
def test_missing_compiler_costs_one_warning(tmp_path: Path) -> None:
    build = _build_wheel(tmp_path, CXX="/nonexistent/c++", MLOMAE_REQUIRE_NATIVE="0")
    assert build.returncode == 0, build.stdout + build.stderr
    assert (build.stdout + build.stderr).count('building extension "mlomae_kernels._C" failed') == 1
    assert "mlomae_kernels/_C.so" not in _wheel_names(tmp_path)


@pytest.mark.slow
def test_required_native_code_must_build(tmp_path: Path) -> None:
    build = _build_wheel(tmp_path, CXX="/nonexistent/c++", MLOMAE_REQUIRE_NATIVE="1")
    assert build.returncode != 0
    assert list(tmp_path.glob("*.whl")) == []
