from __future__ import annotations

import http.client
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from webdataset.gopen import gopen_schemes

from mlomae.data.urls import (
    expand,
    fetch,
    is_remote,
    local_path,
    open_stream,
    shard_name,
    sibling,
    with_retries,
)
from mlomae.errors import UserError
from tests.data.web import Web, serve

pytestmark = pytest.mark.usefixtures("quick_retries")


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    with serve(tmp_path) as server:
        yield server


@pytest.mark.parametrize(
    "url, remote",
    [
        ("/data/train-0.tar", False),
        ("train-0.tar", False),
        ("a:b.tar", False),
        ("file:///data/train-0.tar", False),
        ("file:train-0.tar", False),
        ("http://host/train-0.tar", True),
        ("HTTPS://host/train-0.tar", True),
        ("pipe:cat train-0.tar", True),
        ("s3://bucket/train-0.tar", True),
        ("gs://bucket/train-0.tar", True),
    ],
)
def test_what_is_remote(url: str, remote: bool) -> None:
    assert is_remote(url) == remote


def test_local_paths() -> None:
    assert local_path("/data/x 1.tar") == local_path("file:///data/x%201.tar") == Path("/data/x 1.tar")


def test_expansion(tmp_path: Path) -> None:
    for name in ("train-2.tar", "train-0.tar", "train-10.tar", "val-0.tar", "odd[1].tar"):
        (tmp_path / name).touch()
    assert expand("/a/train-{008..010}.tar") == [f"/a/train-{n}.tar" for n in ("008", "009", "010")]
    assert expand("http://h/{a,b}-{0..1}.tar::pipe:cat x.tar") == [
        "http://h/a-0.tar",
        "http://h/a-1.tar",
        "http://h/b-0.tar",
        "http://h/b-1.tar",
        "pipe:cat x.tar",
    ]
    assert expand(f"{tmp_path}/train-*.tar") == [f"{tmp_path}/train-{n}.tar" for n in ("0", "10", "2")]
    assert expand(f"file://{tmp_path}/val-?.tar") == [f"{tmp_path}/val-0.tar"]
    assert expand(f"{tmp_path}/odd[1].tar") == [f"{tmp_path}/odd[1].tar"]  # there is a file of that very name
    assert expand("/no/such.tar") == ["/no/such.tar"]
    assert expand("http://h/x.tar?a=*") == ["http://h/x.tar?a=*"]


@pytest.mark.parametrize(
    "pattern, message",
    [
        ("/a/{0..3.tar", r"^/a/\{0\.\.3\.tar: cannot be expanded \(.*\); correct the braces$"),
        ("/a/${NO_SUCH_NAME}.tar", r"cannot be expanded \(.*wds_WDS_NO_SUCH_NAME\)"),
        ("/no/such/*.tar", r"^/no/such/\*\.tar: no file matches; correct the pattern$"),
    ],
)
def test_patterns_that_mean_nothing(pattern: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        expand(pattern)


@pytest.mark.parametrize(
    "url, name",
    [
        ("/data/train-0.tar", "train-0.tar"),
        ("train-0.tar", "train-0.tar"),
        ("/data/what?.tar", "what?.tar"),
        ("file:///data/a%20b.tar", "a b.tar"),
        ("https://h/x/train%200.tar?sign=a/b.tar#c", "train 0.tar"),
        ("s3://bucket/x/train-0.tar", "train-0.tar"),
        ("pipe:aws s3 cp s3://b/x/train-0.tar -", "train-0.tar"),
        ("pipe:curl -s 'https://h/train-0.tar?sign=abc' | cat", "train-0.tar"),
        ("pipe:gzip -dc </x/train-0.tar.gz", "train-0.tar.gz"),
        ("pipe:fetch --config a.json train.v2-0.tar --out b.json", "train.v2-0.tar"),
        ("pipe:cat /x/train-index.json", "train-index.json"),
    ],
)
def test_names_and_siblings(url: str, name: str) -> None:
    assert shard_name(url) == name
    other = sibling(url, "other-1.tar")
    assert shard_name(other) == "other-1.tar"
    spelled = next(part for part in (name, name.replace(" ", "%20")) if part in url)
    assert other == url.replace(spelled, "other-1.tar", 1)


def test_a_command_without_a_name() -> None:
    with pytest.raises(UserError, match=r"^pipe:make-shard 7: names no \.tar file"):
        shard_name("pipe:make-shard 7")


@pytest.mark.parametrize("name", ["a.tar; rm x", "$(x).tar", "a b.tar", "`x`.tar", "a.tar\nx", "../a.tar|x"])
def test_a_name_never_becomes_a_command(name: str) -> None:
    with pytest.raises(UserError, match="not a plain file name"):
        sibling("pipe:cat /x/train-index.json", name)


def test_local_and_piped_and_web_content_is_the_same(tmp_path: Path, web: Web) -> None:
    content = bytes(range(256)) * 10_000
    (tmp_path / "a ü.bin").write_bytes(content)
    (tmp_path / "b.tar").write_bytes(content)
    for url in (
        str(tmp_path / "b.tar"),
        (tmp_path / "a ü.bin").as_uri(),
        f"pipe:cat {tmp_path}/b.tar",
        f"{web.url}/b.tar",
        f"{web.url}/a ü.bin",
        f"{web.url}/a%20%C3%BC.bin",
    ):
        with open_stream(url) as stream:
            assert stream.read(10) == content[:10]
            assert stream.read() == content[10:]
            assert stream.read(1) == b""
    web.plain = True  # without a length, the end of the connection is all there is
    assert fetch(f"{web.url}/b.tar") == content


def test_a_missing_page_is_final(web: Web) -> None:
    with pytest.raises(
        UserError, match=rf"^{web.url}/none\.tar: the server answers 404 File not found; corr"
    ):
        fetch(f"{web.url}/none.tar")
    assert web.requests == ["/none.tar"]


@pytest.mark.parametrize("failure", [503, 429, "cut"])
def test_a_passing_failure_is_retried(tmp_path: Path, web: Web, failure: int | str) -> None:
    content = b"x" * 3_000_000
    (tmp_path / "a.tar").write_bytes(content)
    web.failures["/a.tar"] = [failure, failure]
    assert fetch(f"{web.url}/a.tar") == content
    web.failures["/a.tar"] = [failure] * 3
    reason = "cut 1500000 bytes before the end" if failure == "cut" else f"answers {failure}"
    with pytest.raises(UserError, match=rf"a\.tar: cannot be read after 3 attempts \(.*{reason}"):
        fetch(f"{web.url}/a.tar")
    assert len(web.requests) == 6


@pytest.mark.parametrize("size", [1, 1000, 10_000_000])
def test_no_cut_ends_silently(tmp_path: Path, web: Web, size: int) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(5_000_000))
    web.failures["/a.tar"] = ["cut"]
    with open_stream(f"{web.url}/a.tar") as stream, pytest.raises(OSError, match="cut 2500000 bytes before"):
        stream.read(2_000_000)
        while stream.read(max(size, 1000)):
            pass


def test_an_unreachable_server_is_named(web: Web) -> None:
    with pytest.raises(
        UserError, match=r"^http://127\.0\.0\.1:9/x\.tar: cannot be read .* \(Connection refused\)"
    ):
        fetch("http://127.0.0.1:9/x.tar")


@pytest.mark.parametrize(
    "url, message",
    [
        ("no-such-scheme://x/y.tar", r"cannot be opened \(.*\); use a local path, or one of pipe, http, "),
        ("http://host:port/x.tar", r"not a web address \(.*port"),
        ("http:///x.tar", r"cannot be opened \(no host given\)|cannot be read"),
    ],
)
def test_addresses_that_cannot_be(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fetch(url)


def test_a_missing_program_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^gs://b/x\.tar: needs the program 'gsutil'; install it$"):
        fetch("gs://b/x.tar")


@pytest.mark.parametrize(
    "error, message",
    [
        (
            ModuleNotFoundError("No module named 'odd'"),
            r"cannot be opened \(No module named 'odd'\); use a local",
        ),
        (RuntimeError("odd"), r"cannot be read after 3 attempts \(odd\)"),
        (FileNotFoundError("odd/x"), r"cannot be read after 3 attempts \(odd/x\)"),
    ],
)
def test_what_a_scheme_raises(monkeypatch: pytest.MonkeyPatch, error: Exception, message: str) -> None:
    def fail(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setitem(gopen_schemes, "odd", fail)
    with pytest.raises(UserError, match=rf"^odd://x/y\.tar: {message}"):
        fetch("odd://x/y.tar")


def test_addresses_can_be_rewritten(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(b"mirror")
    monkeypatch.setenv("GOPEN_REWRITE", f"http://far/={tmp_path}/;s3://far/=pipe:cat {tmp_path}/")
    assert fetch("http://far/a.tar") == fetch("s3://far/a.tar") == b"mirror"


@pytest.mark.parametrize("command", ["cat {0}; exit 3", "sleep 0.05; head -c 5 {0}; sleep 0.05; exit 3"])
def test_the_status_of_a_command_counts(tmp_path: Path, command: str) -> None:
    (tmp_path / "a.tar").write_bytes(b"content")
    with pytest.raises(
        UserError, match=r"cannot be read after 3 attempts \(its command ended with status 3\)"
    ):
        fetch("pipe:" + command.format(tmp_path / "a.tar"))


def test_a_command_may_be_left_early() -> None:
    begin = time.monotonic()
    with open_stream("pipe:cat /dev/zero") as stream:
        assert stream.read(3) == b"\0\0\0"
    with open_stream("pipe:echo x; exec sleep 30") as stream:
        assert stream.readline() == b"x\n"
    assert time.monotonic() - begin < 10


def test_a_file_that_appears_late_is_found(tmp_path: Path) -> None:
    path = tmp_path / "late.tar"
    attempts: list[int] = []

    def read() -> bytes:
        attempts.append(len(attempts))
        if len(attempts) == 3:
            path.write_bytes(b"here")
        return path.read_bytes()

    assert with_retries(read, "late") == b"here" and len(attempts) == 3


@pytest.mark.parametrize(
    "error",
    [EOFError("ended"), http.client.IncompleteRead(b""), FileNotFoundError(2, "No such file"), OSError()],
)
def test_what_stays_is_reported(error: Exception) -> None:
    attempts: list[int] = []

    def fail() -> None:
        attempts.append(1)
        raise error

    with pytest.raises(
        UserError, match=r"^shard x: cannot be read after 3 attempts \(\w.*\); check"
    ) as caught:
        with_retries(fail, "shard x")
    assert len(attempts) == 3 and "\n" not in str(caught.value)


def test_what_is_no_passing_failure_is_not_retried(tmp_path: Path) -> None:
    attempts: list[int] = []

    def fail(error: Exception) -> None:
        attempts.append(1)
        raise error

    with pytest.raises(KeyError):
        with_retries(lambda: fail(KeyError()), "x")
    with pytest.raises(UserError, match=r"^as it is$"):
        with_retries(lambda: fail(UserError("as it is")), "x")
    assert len(attempts) == 2
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}: cannot be read (Is a directory)")):
        fetch(str(tmp_path))
