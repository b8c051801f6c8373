"""Where shards lie: local paths, web addresses and commands, opened by webdataset's rules."""

from __future__ import annotations

import glob
import http.client
import io
import re
import signal
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeVar, cast
from urllib.error import HTTPError, URLError
from urllib.parse import quote, unquote
from urllib.request import Request, url2pathname, urlopen

from mlomae.errors import UserError

DELAYS = (1.0, 2.0, 4.0, 8.0)  # seconds before the second attempt, the third, …
TIMEOUT = 60.0  # seconds without a byte from a web server
BUFFER = 1 << 20

_TRANSIENT = (OSError, EOFError, http.client.HTTPException, subprocess.SubprocessError)
_PERMANENT = (IsADirectoryError, NotADirectoryError)
_BUSY = (408, 425, 429)  # of the 4xx answers, those that ask for patience
# File names within a command. A shard wins over others, then the last one.
_WORD = r"[^\s'\"|;&<>()=?#/]+"
_SHARD_IN_COMMAND = re.compile(rf"{_WORD}\.(?:tar(?:\.\w+)?|tgz)(?!\w)")
_FILE_IN_COMMAND = re.compile(rf"{_WORD}\.(?:json|npz|ya?ml)(?!\w)")

Result = TypeVar("Result")


def is_remote(url: str) -> bool:
    """Whether ``url`` is a web address, a command (``pipe:``) or the like, and not a file of this machine."""
    return _scheme(url) not in ("", "file")


def local_path(url: str) -> Path:
    """The path behind a local ``url``: a plain path or ``file:``."""
    if _scheme(url) != "file":
        return Path(url)
    return Path(url2pathname(re.sub(r"^file:(//[^/]*)?", "", url)))


def expand(pattern: str) -> list[str]:
    """The urls behind ``pattern``: lists joined by ``::``, braces ``{000..024}`` and, in local paths, globs.

    Raises:
        UserError: braces do not match, or no file matches a glob.
    """
    from webdataset.shardlists import expand_urls

    try:
        urls = expand_urls(pattern)
    except (ValueError, AssertionError, KeyError) as error:  # also ${NAME} where WDS_NAME is not set
        raise UserError(f"{pattern}: cannot be expanded ({error}); correct the braces") from None
    found: list[str] = []
    for url in urls:
        if is_remote(url) or not glob.has_magic(url) or local_path(url).exists():
            found.append(url)
            continue
        matches = sorted(glob.glob(str(local_path(url)), recursive=True))
        if not matches:
            raise UserError(f"{url}: no file matches; correct the pattern")
        found += matches
    return found


def open_stream(url: str) -> BinaryIO:
    """Opens ``url`` for one pass. Reading to the end raises OSError unless everything has arrived.

    That is: a web server has sent as much as it announced, a command has ended with status 0.

    Raises:
        OSError: it cannot be opened now; another attempt may succeed.
        UserError: another attempt would not help.
    """
    from webdataset.gopen import gopen, gopen_schemes, rewrite_url

    try:
        if is_remote(url):
            url = rewrite_url(url)
        if not is_remote(url):
            return open(local_path(url), "rb")
        # Not by webdataset's curl, which does not say why it failed.
        raw = _WebBody(url) if _is_web(url) else _run_command(partial(gopen, url, "rb", bufsize=0))
        return cast(BinaryIO, io.BufferedReader(raw, BUFFER))
    except FileNotFoundError as error:
        if not is_remote(url) or error.filename is None:
            raise
        raise UserError(f"{url}: needs the program {error.filename!r}; install it") from None
    except (ImportError, ValueError) as error:
        known = ", ".join(name for name in gopen_schemes if not name.startswith("_"))
        raise UserError(f"{url}: cannot be opened ({error}); use a local path, or one of {known}") from None
    except (OSError, UserError):
        raise
    except Exception as error:  # packages behind some schemes have exceptions of their own
        raise OSError(_reason(error)) from None


def shard_name(url: str) -> str:
    """The name of the file behind ``url``, such as ``train-0001.tar``.

    Raises:
        UserError: a command that names no file.
    """
    start, end = _name_span(url)
    return unquote(url[start:end]) if _is_web(url) or _scheme(url) == "file" else url[start:end]


def sibling(url: str, name: str) -> str:
    """``name`` beside the file behind ``url``; the rest of a command stays."""
    start, end = _name_span(url)
    if _scheme(url) != "pipe":
        return url[:start] + name + url[end:]
    if re.search(r"[^\w./+@%:,-]", name):  # it comes out of a file, and must not become a command itself
        raise UserError(f"{name!r}: not a plain file name, as {url} needs; rename it")
    return url[:start] + name + url[end:]


def fetch(url: str) -> bytes:
    """The whole content of a small file.

    Raises:
        UserError: it cannot be had.
    """

    def read() -> bytes:
        with open_stream(url) as stream:
            return stream.read()

    return with_retries(read, url)


def with_retries(action: Callable[[], Result], what: str) -> Result:
    """Calls ``action`` until it does not fail for a passing reason, with the pauses ``DELAYS``.

    A missing file counts as one: network file systems show new files late.

    Raises:
        UserError: all attempts failed; ``what`` begins the message.
    """
    for delay in (*DELAYS, None):
        try:
            return action()
        except _TRANSIENT as error:
            reason = _reason(error)
            if isinstance(error, _PERMANENT):
                raise UserError(f"{what}: cannot be read ({reason})") from None
        if delay is not None:
            time.sleep(delay)
    raise UserError(
        f"{what}: cannot be read after {len(DELAYS) + 1} attempts ({reason}); check that it is there"
    )


class _WebBody(io.RawIOBase):
    """The body of a web server's answer."""

    def __init__(self, url: str) -> None:
        super().__init__()
        address = quote(url, safe="%/:=&?~#+!$,;'@()*[]")  # spaces and letters beyond ASCII
        try:
            self._response = urlopen(Request(address, headers={"User-Agent": "mlomae"}), timeout=TIMEOUT)
        except HTTPError as error:
            error.close()
            answer = f"the server answers {error.code} {error.reason}"
            if 400 <= error.code < 500 and error.code not in _BUSY:
                raise UserError(f"{url}: {answer}; correct the address, or ask for access") from None
            raise OSError(answer) from None
        except URLError as error:
            raise OSError(_reason(error)) from None
        except http.client.InvalidURL as error:
            raise UserError(f"{url}: not a web address ({error}); correct it") from None
        length = self._response.headers.get("Content-Length") or ""
        self._missing = int(length) if length.isdigit() else 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = self._response.readinto(buffer)
        self._missing -= count
        if not count and self._missing > 0:  # http.client takes a cut connection for the end
            raise ConnectionError(f"the connection was cut {self._missing} bytes before the end")
        return count

    def close(self) -> None:
        if not self.closed and hasattr(self, "_response"):
            self._response.close()
        super().close()


def _run_command(start: Callable[[], Any]) -> _CommandOutput:
    """Starts a command that outlives SIGUSR1 to the whole job: to stop is up to the training."""
    # A blocked signal stays blocked in what is started; a handler would not.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        return _CommandOutput(start())
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _CommandOutput(io.RawIOBase):
    """What a command of webdataset's gopen writes."""

    def __init__(self, pipe: Any) -> None:
        super().__init__()
        self._pipe = pipe

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count: int = self._pipe.stream.readinto(buffer)
        if not count:  # webdataset looks at the status only where the command has ended before this read
            status = self._pipe.proc.wait()
            if status not in self._pipe.ignore_status:
                raise OSError(f"its command ended with status {status}")
        return count

    def close(self) -> None:
        if not self.closed:
            self._pipe.stream.close()
            self._pipe.proc.terminate()  # it may otherwise go on for long
            self._pipe.proc.wait()
        super().close()


def _scheme(url: str) -> str:
    match = re.match(r"(?:(pipe|file):|([A-Za-z][A-Za-z0-9+.-]*)://)", url)
    return "" if match is None else (match[1] or match[2]).lower()


def _is_web(url: str) -> bool:
    return _scheme(url) in ("http", "https")


def _name_span(url: str) -> tuple[int, int]:
    """Where the file name begins and ends in ``url``."""
    if _scheme(url) != "pipe":
        query = re.search(r"[?#]", url) if is_remote(url) else None
        end = len(url) if query is None else query.start()
        return url.rfind("/", 0, end) + 1, end
    for pattern in (_SHARD_IN_COMMAND, _FILE_IN_COMMAND):
        names = list(pattern.finditer(url, len("pipe:")))
        if names:
            return names[-1].span()
    raise UserError(f"{url}: names no .tar file; let the command contain the name of what it writes")


def _reason(error: BaseException) -> str:
    while isinstance(error, URLError) and isinstance(error.reason, BaseException):
        error = error.reason
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()) or type(error).__name__
