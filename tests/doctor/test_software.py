"""Versions against requirements, and drivers against torch."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest
import torch

from mlomae.doctor import software
from mlomae.doctor.checks import Result, carry_out
from mlomae.doctor.software import release, requirements, software_checks


def result(name: str) -> Result:
    (check,) = (check for check in software_checks() if check.name == name)
    return carry_out(check)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Versions that the packages of these names have in a test; None for one that is missing."""
    versions: dict[str, str | None] = {}
    real = metadata.version

    def version(name: str) -> str:
        if name not in versions:
            return real(name)
        found = versions[name]
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", version)
    return versions


@pytest.mark.parametrize(
    ("version", "numbers"),
    [("2.11.0+cu128", (2, 11, 0)), ("1.0rc1", (1, 0)), ("3", (3,)), ("", ()), ("unknown", ())],
)
def test_releases_are_compared_by_their_numbers(version: str, numbers: tuple[int, ...]) -> None:
    assert release(version) == numbers
    assert release("2.9.1") < release("2.11")


def test_requirements_are_those_of_the_package_on_this_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.11", "numpy", "triton; sys_platform == 'linux'", 'onnx; extra == "onnx"']
    monkeypatch.setattr(metadata, "requires", lambda name: lines)
    monkeypatch.setattr("sys.platform", "linux")
    assert requirements() == {"torch": "2.11", "numpy": "", "triton": ""}
    monkeypatch.setattr("sys.platform", "darwin")
    assert requirements() == {"torch": "2.11", "numpy": ""}
    assert result("triton") == Result("software", "triton", "absent", "not needed on darwin", None)


def test_an_old_package_is_a_problem(installed: dict[str, str | None]) -> None:
    installed["timm"] = "0.9.16"

    lowest = requirements()["timm"]
    found = f"0.9.16, needed is {lowest} or later"
    assert result("timm") == Result("software", "timm", "problem", found, f"pip install -U 'timm>={lowest}'")


def test_a_missing_package_is_a_problem_only_where_it_is_required(installed: dict[str, str | None]) -> None:
    installed |= {"deepspeed": None, "flash-attn": None, "pyyaml": None}

    lowest = requirements()["deepspeed"]
    wanted = f"deepspeed>={lowest}"
    assert result("deepspeed").found == f"not installed, needed is {wanted}"
    assert result("deepspeed").fix == f"pip install '{wanted}'"
    assert result("flash-attn").status == "absent"
    wanted = f"pyyaml>={requirements()['pyyaml']}"
    assert result("other packages").found == f"pyyaml: not installed, needed is {wanted}"
    assert result("other packages").fix == f"pip install '{wanted}'"


def test_versions_of_this_installation(installed: dict[str, str | None]) -> None:
    assert result("torch").found.startswith(torch.__version__.partition("+")[0])
    assert result("timm").found == metadata.version("timm")
    assert result("Python").status == "ok"


@pytest.mark.parametrize(
    ("cuda", "error", "status", "found"),
    [
        ("13.0", None, "ok", "570.86.10, takes CUDA 13.0"),
        (None, None, "problem", "570.86.10, but torch is no CUDA build"),
        (
            "13.0",
            RuntimeError("The NVIDIA driver is too old"),
            "problem",
            "RuntimeError: The NVIDIA driver is too old",
        ),
    ],
)
def test_the_driver_has_to_take_what_torch_is_built_for(
    cuda: str | None,
    error: Exception | None,
    status: str,
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def init() -> None:
        if error is not None:
            raise error

    told = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build\n"
    (tmp_path / "version").write_text(told)
    monkeypatch.setattr(software, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "init", init)

    assert (result("NVIDIA driver").status, result("NVIDIA driver").found) == (status, found)


def test_no_driver_is_no_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(software, "_DRIVER", tmp_path / "version")

    assert result("NVIDIA driver").status == "absent"


def test_a_clone_that_is_not_installed_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", missing)
    monkeypatch.setattr(metadata, "metadata", missing)

    for name in ("Python", "timm", "other packages"):
        assert result(name).found == "PackageNotFoundError: No package metadata was found for mlomae"
        assert result(name).fix == "run the install command of README.md again"


def test_an_old_python_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.python_version", lambda: "3.9.18")

    assert result("Python").found == "3.9.18, needed is 3.11 or later"
    assert result("Python").fix == "make a virtual environment with a newer Python"
