"""What the data benchmarks read, and in which state a stream begins its turn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.data.images import NUM_PHOTOGRAPHS, copy_photographs, link_shards, pack, unpack
from benchmarks.data.streams import alone


def test_shards_hold_the_images_of_a_folder(tmp_path: Path) -> None:
    contents = {f"class-{label}/{label}.png": f"image {label}".encode() for label in (0, 3, 12)}
    for name, content in contents.items():
        (tmp_path / "from" / name).parent.mkdir(parents=True)
        (tmp_path / "from" / name).write_bytes(content)
    pack(tmp_path / "from", tmp_path / "shards", shards=2)
    shards = sorted((tmp_path / "shards").iterdir())
    assert [shard.name for shard in shards] == ["train-0000.tar", "train-0001.tar"]
    for shard in shards:
        unpack(shard, tmp_path / "to")
    found = {str(file.relative_to(tmp_path / "to")): file.read_bytes() for file in tmp_path.glob("to/*/*")}
    assert found == contents


def test_the_first_training_shards_are_linked(tmp_path: Path) -> None:
    names = ["train-0002.tar", "train-0000.tar", "train-0001.tar", "test-0000.tar"]
    (tmp_path / "all").mkdir()
    for name in names:
        (tmp_path / "all" / name).write_text(name)
    link_shards(tmp_path / "all", tmp_path / "few", 2)
    found = {file.name: file.read_text() for file in (tmp_path / "few").iterdir()}
    assert found == {name: name for name in ("train-0000.tar", "train-0001.tar")}


@pytest.mark.parametrize("given", [NUM_PHOTOGRAPHS // 2, 3 * NUM_PHOTOGRAPHS])
def test_as_many_photographs_as_wanted_come_from_all_over_a_folder(tmp_path: Path, given: int) -> None:
    for number in range(given):
        path = tmp_path / "from" / f"{number % 7}" / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(number))
    (tmp_path / "from" / "list.txt").write_text("no photograph")
    copy_photographs(tmp_path / "from", tmp_path / "to")
    found = Counter(file.read_text() for file in tmp_path.glob("to/*/*.jpg"))
    assert found.total() == NUM_PHOTOGRAPHS
    assert len(found) == min(given, NUM_PHOTOGRAPHS)
    assert {int(number) % 7 for number in found} == set(range(7))


def test_a_folder_without_photographs_is_refused(tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_text("no JPEG")
    with pytest.raises(FileNotFoundError, match="no JPEG below"):
        copy_photographs(tmp_path, tmp_path / "to")


class Recorded:
    """A stream that writes down what happens to it."""

    def __init__(self, name: str, events: list[str]) -> None:
        self._name, self._events = name, events

    def next(self) -> None:
        self._events.append(f"next {self._name}")

    def close(self) -> None:
        self._events.append(f"close {self._name}")


def test_a_stream_begins_its_turn_alone_and_under_way() -> None:
    events: list[str] = []
    before = alone({name: Recorded(name, events) for name in ("a", "b")})
    before["b"]()
    assert events == ["close a", "close b", "next b"]
