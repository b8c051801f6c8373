"""Which implementation is used, what is said about it, and what happens where it cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import mlomae_kernels as ops
from mlomae_kernels import _native, dispatch
from tests.ops.targets import NATIVE

_CACHES = (
    _native.native_status,
    dispatch._environment_choice,
    dispatch._find,
    dispatch._resolve,
    dispatch._warn_once,
    dispatch.debug,
)


@pytest.fixture
def fresh_choice() -> Iterator[None]:
    """Lets a test change what the choice depends on; everything is found anew afterwards."""
    for cache in _CACHES:
        cache.cache_clear()
    yield
    for cache in _CACHES:
        cache.cache_clear()


def test_native_code_is_the_default_on_the_cpu() -> None:
    with NATIVE.use():
        pass  # skips where it was not built
    with ops.implementation("auto"):
        assert ops.describe("cpu") == "native (loaded _C.so)"
        assert (
            dispatch.fast_implementation("patch_gather", "cpu")
            is torch.ops.mlomae_native.patch_gather.default
        )


def test_other_devices_take_plain_pytorch() -> None:
    assert dispatch.fast_implementation("patch_gather", "xpu") is None
    assert ops.describe("xpu") == "reference (no other implementation for xpu)"


def test_reference_can_be_forced(monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    monkeypatch.setenv("MLOMAE_KERNELS", "reference")
    assert ops.describe("cpu") == "reference (switched off by MLOMAE_KERNELS=reference)"
    assert dispatch.fast_implementation("patch_gather", "cpu") is None


def test_an_implementation_is_overridden_for_a_while() -> None:
    before = ops.describe("cpu")
    with ops.implementation("reference"):
        assert ops.describe("cpu").startswith("reference")
        with pytest.raises(ValueError, match="implementation: got 'fast', expected one of auto, reference"):
            ops.implementation("fast").__enter__()
    assert ops.describe("cpu") == before


def test_unknown_choice_is_an_error(monkeypatch: pytest.MonkeyPatch, fresh_choice: None) -> None:
    monkeypatch.setenv("MLOMAE_KERNELS", "fast")
    with pytest.raises(ValueError, match="MLOMAE_KERNELS: got 'fast', expected one of auto, reference"):
        ops.select_patches(torch.zeros(1, 2), 1)


def test_absent_native_code_costs_one_warning(
    monkeypatch: pytest.MonkeyPatch, fresh_choice: None, tmp_path: Path
) -> None:
    monkeypatch.delenv("MLOMAE_KERNELS", raising=False)
    monkeypatch.setattr(_native, "_FOLDER", tmp_path)
    with pytest.warns(RuntimeWarning, match="plain PyTorch on cpu, slower: _C.so was not built") as warned:
        for num_keep in (1, 2):
            assert ops.select_patches(torch.tensor([[2.0, 1.0]]), num_keep)[0][0, 0] == 1
        ops.patch_gather(torch.zeros(1, 2, 3), None, torch.tensor([[0]]), None)
    assert len(warned) == 1
    assert ops.describe("cpu") == "reference (_C.so was not built when the package was installed)"


def test_broken_native_code_has_a_reason(
    monkeypatch: pytest.MonkeyPatch, fresh_choice: None, tmp_path: Path
) -> None:
    monkeypatch.setattr(_native, "_FOLDER", tmp_path)
    (tmp_path / "_C.so").write_bytes(b"not a library")
    assert ops.describe("cpu").startswith("reference (_C.so cannot be loaded: ")


def test_a_forced_choice_does_not_fall_back(
    monkeypatch: pytest.MonkeyPatch, fresh_choice: None, tmp_path: Path
) -> None:
    monkeypatch.setattr(_native, "_FOLDER", tmp_path)
    with (
        ops.implementation("native"),
        pytest.raises(RuntimeError, match=r"select_patches: MLOMAE_KERNELS=native on cpu: _C.so was not"),
    ):
        ops.select_patches(torch.zeros(1, 2), 1)


def test_triton_needs_its_interpreter_on_the_cpu() -> None:
    code = "import torch, mlomae_kernels as ops; ops.select_patches(torch.zeros(1, 2), 1)"
    settings = {**os.environ, "MLOMAE_KERNELS": "triton", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=settings, capture_output=True, text=True)
    assert done.returncode != 0
    expected = (
        "select_patches: MLOMAE_KERNELS=triton on cpu: triton runs on the CPU under TRITON_INTERPRET=1 only"
    )
    assert expected in done.stderr


def test_debug_mode_checks_indices_before_any_implementation(
    monkeypatch: pytest.MonkeyPatch, fresh_choice: None
) -> None:
    monkeypatch.setenv("MLOMAE_KERNELS_DEBUG", "1")
    tokens, ids = torch.zeros(1, 3, 2), torch.tensor([[3]])
    for choice in ("auto", "triton"):
        with (
            ops.implementation(choice),
            pytest.raises(ValueError, match="patch_gather: ids_keep: got 3, expected 0 to 2"),
        ):
            ops.patch_gather(tokens, None, ids, None)


def test_native_code_checks_what_reaches_it_without_the_python_package() -> None:
    with NATIVE.use():
        pass
    native = torch.ops.mlomae_native
    tokens, ids = torch.zeros(2, 5, 3), torch.zeros(2, 2, dtype=torch.int64)
    for call in (
        lambda: native.select_patches(torch.zeros(9), 3),
        lambda: native.select_patches(torch.zeros(2, 9), 10),
        lambda: native.patch_gather(tokens[0], None, ids, None),
        lambda: native.patch_gather(tokens, None, ids.int(), None),
        lambda: native.patch_gather(tokens, torch.zeros(1, 4, 3), ids, None),
        lambda: native.patch_gather_backward(tokens, ids, 5, True, False),
        lambda: native.patch_scatter(tokens, torch.zeros(1, 1, 3), ids, torch.zeros(1, 3, 3)),
        lambda: native.patch_scatter_backward(tokens, ids, 2, True),
        lambda: native.masked_patch_loss(tokens, torch.zeros(2, 3, 4, 4), ids, None, 2, True),
        lambda: native.masked_patch_loss_backward(
            torch.zeros(2, 4), tokens, torch.zeros(2, 3, 4, 4), torch.zeros(2, 4), None, 2, True
        ),
    ):
        with pytest.raises(RuntimeError, match=r"(select_patches|patch_\w+|masked_\w+): \w+: "):
            call()


def test_thread_count_changes_no_bit() -> None:
    with NATIVE.use():
        pass
    torch.manual_seed(0)
    tokens, ids = torch.randn(16, 49, 33), torch.rand(16, 49).argsort(1)[:, :12]
    restore = torch.rand(16, 49).argsort(1)
    images, mask = torch.randn(16, 3, 28, 28), (restore >= 12).float()
    native = torch.ops.mlomae_native

    def results() -> list[torch.Tensor]:
        loss_inputs = (torch.ones(16, 49), torch.ones(16, 49, 48), images, mask, mask, 4, True)
        return [
            *native.select_patches(tokens[:, :, 0], 12),
            *native.patch_gather_backward(tokens[:, :13], ids, 49, True, True),
            *native.patch_scatter_backward(tokens, restore[:, :48].argsort(1), 12, True),
            native.masked_patch_loss(*loss_inputs[1:]),
            *native.masked_patch_loss_backward(*loss_inputs),
        ]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = results()
        torch.set_num_threads(4)
        four = results()
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(one, four, strict=True))
