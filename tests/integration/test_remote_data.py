"""Whole runs on shards that a web server or a command hands out: the same samples as from files."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from random import Random
from typing import Any

import pytest

from mlomae.data.shards.index import write_index
from mlomae.data.shards.scan import scan
from tests.integration import test_lost_shards
from tests.integration.bad_shards import WAYS, write_shards
from tests.integration.read_keys import Rows, noted
from tests.integration.tiny import read_result, without_pictures

SHARDS, SAMPLES = 4, 25
PATTERN = "train-{000000..000003}.tar"
NUM_BAD = 5


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)
    monkeypatch.setattr("mlomae.data.urls.DELAYS", (0.001,) * 10)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards with a few bad samples, and their index."""
    folder = tmp_path_factory.mktemp("shards")
    ways = list(WAYS)[::2]
    write_shards(folder, SHARDS, SAMPLES, {7 + 19 * number: way for number, way in enumerate(ways)})
    assert len(ways) == NUM_BAD
    write_index(folder / "train-index.json", scan([str(path) for path in sorted(folder.glob("*.tar"))]))
    return folder


@pytest.fixture(scope="module")
def local(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Rows:
    """What a run reads from the files, front to back."""
    with pytest.MonkeyPatch.context() as patch:
        without_pictures(patch)
        rows, code = train(tmp_path_factory.mktemp("local"), str(shards), {"data.access": "sequential"})
    assert code == 0
    return rows


def train(tmp_path: Path, path: str, fields: dict[str, Any]) -> tuple[Rows, int]:
    """What a whole run reads, evaluation included, and its exit code."""
    reading = {"data.shuffle_buffer": 48, "data.augment": "crop-flip", "data.max_bad_share": 0.1}
    with noted() as rows:
        code = test_lost_shards.train(tmp_path, path, {**reading, **fields})
    return rows, code


class Server(ThreadingHTTPServer):
    """Hands out a folder; of every eight requests for a file one is refused and one cut, if it is flaky.

    Attributes:
        faults: refused and cut requests.
    """

    daemon_threads = True

    def __init__(self, folder: Path, flaky: bool) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.flaky = folder, flaky
        self.requests: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.draw = Random(0)
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client may leave before it has everything."""


class Handler(SimpleHTTPRequestHandler):
    server: Server

    def __init__(self, request: Any, address: Any, server: Server) -> None:
        super().__init__(request, address, server, directory=str(server.folder))

    def do_GET(self) -> None:
        server = self.server
        with server.lock:
            server.requests[self.path] += 1
            turn = server.requests[self.path] % 8 if server.flaky else 0
            position = server.draw.random()
        file = server.folder / self.path.lstrip("/")
        if turn == 1:
            server.faults["refused"] += 1
            self.send_error(503)
        elif turn == 2:
            server.faults["cut"] += 1
            content = file.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[: int(len(content) * position)])
        else:
            super().do_GET()

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on the screen."""


@contextmanager
def serving(folder: Path, flaky: bool = False) -> Iterator[Server]:
    with Server(folder, flaky) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("flaky", [False, True])
def test_a_run_over_the_web_reads_what_one_from_files_does(
    flaky: bool, workers: int, shards: Path, local: Rows, tmp_path: Path
) -> None:
    with serving(shards, flaky) as server:
        rows, code = train(tmp_path, f"{server.address}/{PATTERN}", {"data.workers": workers})

    assert code == 0
    assert rows == local
    assert read_result(tmp_path / "run")["bad_samples"] == NUM_BAD
    if flaky:
        assert min(server.faults["refused"], server.faults["cut"]) >= SHARDS + 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_from_commands_reads_what_one_from_files_does(
    workers: int, shards: Path, local: Rows, tmp_path: Path
) -> None:
    rows, code = train(tmp_path, f"pipe:cat {shards}/{PATTERN}", {"data.workers": workers})

    assert code == 0
    assert rows == local
    assert read_result(tmp_path / "run")["bad_samples"] == NUM_BAD


def test_an_index_may_stand_for_the_shards(shards: Path, local: Rows, tmp_path: Path) -> None:
    with serving(shards) as server:
        rows, code = train(tmp_path, f"{server.address}/train-index.json", {})

    assert (code, rows == local) == (0, True)


def test_files_read_front_to_back_by_workers_give_the_same(shards: Path, local: Rows, tmp_path: Path) -> None:
    rows, code = train(tmp_path, str(shards), {"data.access": "sequential", "data.workers": 2})

    assert (code, rows == local) == (0, True)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_the_server_lacks_is_named(
    workers: int, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    for path in shards.iterdir():
        if path.name != "train-000002.tar":
            (there / path.name).symlink_to(path)
    with serving(there) as server:
        _, code = train(tmp_path, f"{server.address}/{PATTERN}", {"data.workers": workers})

    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mlomae: error: {server.address}/train-000002.tar: the server answers 404 ")


def test_a_server_that_does_not_answer_is_named(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(shards) as server:
        address = server.address

    _, code = train(tmp_path, f"{address}/{PATTERN}", {})

    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"mlomae: error: {address}/train-index.json: cannot be read after 11 attempts (")
    assert not (tmp_path / "run").exists()


def test_a_command_that_fails_is_named(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    there = tmp_path / "there"
    there.mkdir()
    for path in shards.iterdir():
        if path.name != "train-000002.tar":
            (there / path.name).symlink_to(path)

    _, code = train(tmp_path, f"pipe:cat {there}/{PATTERN} 2>/dev/null", {})

    assert code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(
        f"mlomae: error: pipe:cat {there}/train-000002.tar 2>/dev/null: cannot be read after"
    )
