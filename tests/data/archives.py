"""Tar archives as programs write them, and as accidents leave them."""

from __future__ import annotations

import io
import random
import tarfile
from pathlib import Path

LONG = "folder-with-a-long-name/" * 9 + "image-of-a-sample"


def member(name: str, content: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, content


def write(path: Path, members: list[tuple[tarfile.TarInfo, bytes]], **options: object) -> None:
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for info, content in members:
            tar.addfile(info, io.BytesIO(content))


def odd_members() -> list[tuple[tarfile.TarInfo, bytes]]:
    """Whatever tar programs write around and into samples."""
    names = ["a", "./b", "dir/c.d/e", LONG, "ümläut/日本", "x" * 96, "y" * 150, "dir/" + "z" * 97, "sp ace"]
    members = [member("dir", type=tarfile.DIRTYPE), member("images.jpg", type=tarfile.DIRTYPE)]
    for number, name in enumerate(names):
        members.append(member(f"{name}.JPG", bytes([number]) * (number * 300), mtime=1.5 * (number % 2)))
        members.append(member(f"{name}.cls", str(number).encode(), uid=3_000_000 * number))
        members.append(member(f"{name}.seg.png", b"not the image"))
    return [
        *members,
        member("link.txt", type=tarfile.SYMTYPE, linkname="a.JPG"),
        member("hard.txt", type=tarfile.LNKTYPE, linkname="a.JPG"),
        member("fifo", type=tarfile.FIFOTYPE),
        member("__meta__.json", b"{}"),
        member("__x__/a.jpg", b"skipped"),
        member("dir/.hidden.jpg", b"hidden"),
        member("last.png", b"z" * 512),
    ]


def with_checksum(header: bytearray) -> bytes:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def damage(content: bytearray, draw: random.Random, headers: list[int]) -> None:
    start = draw.choice([header for header in headers if header + 512 <= len(content)] or [0])
    kind = draw.choice(["byte", "field", "type", "cut", "swap", "zero", "insert"])
    if kind == "byte":
        content[draw.randrange(len(content))] = draw.randrange(256)
    elif kind in ("field", "type"):  # with a right checksum, which gets further
        header = content[start : start + 512]
        if kind == "type":
            header[156] = draw.choice(b"0123457gxLKSVXD\0\xff")
        else:
            first, last = draw.choice([(0, 100), (100, 108), (124, 136), (124, 136), (257, 265), (345, 500)])
            header[first:last] = draw.choice(
                [draw.randbytes(last - first), b"%0*o\0" % (last - first - 1, draw.randrange(8**7))]
            )[: last - first]
        content[start : start + 512] = with_checksum(header)
    elif kind == "cut":
        del content[draw.randrange(1, len(content)) :]
    elif kind == "zero":
        content[start : start + 512] = bytes(512)
    elif kind == "insert":
        content[start:start] = draw.randbytes(draw.choice([1, 512]))
    else:
        other = draw.choice(headers)
        content[start : start + 512], content[other : other + 512] = (
            content[other : other + 512],
            content[start : start + 512],
        )
