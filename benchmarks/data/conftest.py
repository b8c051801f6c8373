"""The images of the data benchmarks: CIFAR-10 with ``--cifar10 DIR``, synthetic ones of its size without."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.data.images import pack, unpack
from benchmarks.peers.problem import write_images


@pytest.fixture(scope="session")
def image_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders: the images of one shard of CIFAR-10, or synthetic ones."""
    folder = tmp_path_factory.mktemp("images")
    shards = request.config.getoption("cifar10")
    if shards is None:
        write_images(folder)
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
    pack(image_folder, folder / "train-0000.tar")
    return folder
