"""The only home of the package's metadata, and the build of its optional native libraries.

Environment:
    MLOMAE_NO_NATIVE=1       do not build native code
    MLOMAE_REQUIRE_NATIVE=1  fail the install when native code cannot be built (default: one warning)
    MLOMAE_NO_CUDA=1         do not build the CUDA library, which is built where nvcc is found and torch is a
                             CUDA build
    MLOMAE_REQUIRE_CUDA=1    fail the install when the CUDA library cannot be built
    TORCH_CUDA_ARCH_LIST     its architectures, such as "8.0;9.0" (default: 8.0, 9.0 and 10.0)
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import ExecError

ROOT = Path(__file__).resolve().parent


CPU_LIBRARY, CUDA_LIBRARY = "mlomae_kernels._C", "mlomae_kernels._C_cuda"
CUDA_ARCHITECTURES = "8.0;9.0;10.0"
ONNX = ["onnx", "onnxscript", "onnxruntime"]
DOCS = ["mkdocs-material", "mkdocstrings[python]"]
LOGGERS = {"wandb": ["wandb"], "mlflow": ["mlflow"]}


class CMakeBuild(build_ext):
    """Builds an extension with CMake.

    Every failure is a DistutilsError (``self.spawn`` raises it, subprocess would not): only those turn
    an optional extension into a warning.
    """

    def get_ext_filename(self, fullname: str) -> str:
        """Plain ``_C.so``: a library knows nothing of Python, so no Python tag belongs in its name."""
        return str(Path(*fullname.split(".")).with_suffix(".so"))

    def build_extension(self, ext: Extension) -> None:
        torch_dir = _torch_dir()
        if torch_dir is None:
            raise ExecError("native code needs an installed torch: see the install command in README.md")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve() / ext.name
        cmake = _find_program("cmake")
        if cmake is None:
            raise ExecError("native code needs cmake: pip install cmake ninja")
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{build_dir}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DTORCH_INCLUDE_DIR={torch_dir / 'include'}",
            f"-DTORCH_LIBRARY_DIR={torch_dir / 'lib'}",
        ]
        if ext.name == CUDA_LIBRARY:
            configure += [
                "-DMLOMAE_CUDA=ON",
                f"-DCMAKE_CUDA_COMPILER={_find_program('nvcc') or 'nvcc'}",
                f"-DCMAKE_CUDA_ARCHITECTURES={_cuda_architectures()}",
            ]
        ninja = _find_program("ninja")
        if ninja is not None:
            configure += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        self.spawn(configure)
        self.spawn([cmake, "--build", str(build_dir)])


def _find_program(name: str) -> str | None:
    """Prefers the one pip put beside this Python: a virtual environment need not be on PATH."""
    beside_python = str(Path(sys.executable).parent)
    return shutil.which(name, path=os.pathsep.join([beside_python, os.environ.get("PATH", "")]))


def _torch_dir() -> Path | None:
    """The folder of the installed torch, found without importing it."""
    torch = importlib.util.find_spec("torch")
    if torch is None or not torch.submodule_search_locations:
        return None
    return Path(torch.submodule_search_locations[0])


def _cuda_architectures() -> str:
    """TORCH_CUDA_ARCH_LIST in CMake's words: "8.0;9.0+PTX" → "80-real;90"; the last one always gets PTX."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES).replace(" ", ";").split(";")
    names = [name for name in listed if name]
    return ";".join(
        name.removesuffix("+PTX").replace(".", "")
        + ("" if name.endswith("+PTX") or number == len(names) else "-real")
        for number, name in enumerate(names, start=1)
    )


def _flag(name: str) -> bool:
    return os.environ.get(name, "0") == "1"


def _version() -> str:
    text = (ROOT / "mlomae" / "__init__.py").read_text()
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit('mlomae/__init__.py: no line __version__ = "..."')
    return found[1]


def _requirements() -> list[str]:
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    return [line for line in lines if line]


def _extensions() -> list[Extension]:
    if _flag("MLOMAE_NO_NATIVE"):
        return []
    extensions = [Extension(CPU_LIBRARY, sources=[], optional=not _flag("MLOMAE_REQUIRE_NATIVE"))]
    required, torch_dir = _flag("MLOMAE_REQUIRE_CUDA"), _torch_dir()
    cuda_torch = torch_dir is not None and (torch_dir / "lib" / "libtorch_cuda.so").exists()
    if required or (not _flag("MLOMAE_NO_CUDA") and cuda_torch and _find_program("nvcc")):
        extensions.append(Extension(CUDA_LIBRARY, sources=[], optional=not required))
    return extensions


setup(
    name="mlomae",
    version=_version(),
    description="Masked autoencoders with masks learned by multilevel optimisation",
    long_description=(ROOT / "README.md").read_text(),
    long_description_content_type="text/markdown",
    keywords=["masked autoencoder", "vision transformer", "self-supervised learning", "bilevel optimisation"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
    ],
    project_urls={"Paper": "https://arxiv.org/abs/2402.18128"},
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["mlomae", "mlomae.*"]),
        *find_packages(where="kernels"),
        "mlomae.slurm.scripts",
        "mlomae.recipes.files",
    ],
    # kernels/ is a source root, not a package: see CONTRIBUTING.md. Users of a clone have the job scripts in
    # slurm/ and the recipes in recipes/, those of a wheel in mlomae/slurm/scripts and mlomae/recipes/files.
    package_dir={
        "mlomae_kernels": "kernels/mlomae_kernels",
        "mlomae.slurm.scripts": "slurm",
        "mlomae.recipes.files": "recipes",
    },
    package_data={
        "mlomae": ["py.typed"],
        "mlomae.report": ["assets/*"],
        "mlomae_kernels": ["py.typed"],
        "mlomae.slurm.scripts": ["*.sbatch", "run.sh"],
        "mlomae.recipes.files": ["*.yaml", "*/*.yaml"],
    },
    ext_modules=_extensions(),
    cmdclass={"build_ext": CMakeBuild},
    install_requires=_requirements(),
    extras_require={
        "test": [
            "pytest",
            "pytest-benchmark",
            "pytest-cov",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "mypy",
            "types-PyYAML",
            "build",
            # The libraries that exported weights are for.
            "transformers",
            *ONNX,
            "torchmetrics",
            # What runs are logged to, the report's browser, the documentation and its notebook.
            *LOGGERS["wandb"],
            *LOGGERS["mlflow"],
            "playwright",
            *DOCS,
            "nbclient",
            "nbformat",
            "ipykernel",
        ],
        "flash": ["flash-attn"],
        "onnx": ONNX,
        "docs": DOCS,
        **LOGGERS,
    },
    entry_points={"console_scripts": ["mlomae = mlomae.cli:main"]},
)
