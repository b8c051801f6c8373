"""The images of the data benchmarks: those that the options name, synthetic ones of their size without."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from benchmarks.data.images import (
    copy_photographs,
    link_shards,
    pack,
    unpack,
    write_photographs,
    write_small_images,
)

NUM_SHARDS = 4
"""Of those that are read front to back: every worker needs one of its own."""


@pytest.fixture(scope="session")
def image_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders: the images of one shard of CIFAR-10, or synthetic ones."""
    folder = tmp_path_factory.mktemp("images")
    shards = request.config.getoption("cifar10")
    if shards is None:
        write_small_images(folder)
    else:
        unpack(min(shards.glob("train-*.tar")), folder)
    return folder


@pytest.fixture(scope="session")
def shards(
    request: pytest.FixtureRequest, image_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A folder of shards: all of CIFAR-10, or the synthetic images."""
    given: Path | None = request.config.getoption("cifar10")
    if given is not None:
        return given
    folder = tmp_path_factory.mktemp("shards")
    pack(image_folder, folder, NUM_SHARDS)
    return folder


@pytest.fixture(scope="session")
def few_shards(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the first ``NUM_SHARDS`` training shards and of no test shards."""
    folder = tmp_path_factory.mktemp("few-shards")
    link_shards(shards, folder, NUM_SHARDS)
    return folder


@pytest.fixture(scope="session")
def unpacked_shards(few_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders: the images of ``few_shards``."""
    folder = tmp_path_factory.mktemp("unpacked")
    for shard in few_shards.iterdir():
        unpack(shard, folder)
    return folder


@pytest.fixture(scope="session")
def photographs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of ``NUM_PHOTOGRAPHS`` photographs with ``--imagenet DIR``, of synthetic ones without."""
    folder = tmp_path_factory.mktemp("photographs")
    given = request.config.getoption("imagenet")
    if given is None:
        write_photographs(folder)
    else:
        copy_photographs(given, folder)
    return folder


@pytest.fixture(scope="session")
def photograph_shards(photographs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of shards of the photographs."""
    folder = tmp_path_factory.mktemp("photograph-shards")
    pack(photographs, folder, NUM_SHARDS)
    return folder


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Keeps torch to one core, in this process as in a worker."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
