"""Reads the file that W&B keeps of a run without a server: records in LevelDB's log format."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_BLOCK = 32 * 1024
_HEADER = 7  # of the file (":W&B", a magic number, a version), and of every piece (checksum, length, kind)


@dataclass
class WandbRun:
    """What a file tells."""

    id: str = ""
    name: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None


def read(path: Path) -> WandbRun:
    from wandb.proto import wandb_internal_pb2

    run = WandbRun()
    for record in _records(path.read_bytes()):
        message = wandb_internal_pb2.Record()
        message.ParseFromString(record)
        match message.WhichOneof("record_type"):
            case "run":
                run.id, run.name, run.project = (
                    message.run.run_id, message.run.display_name, message.run.project,
                )  # fmt: skip
                run.config |= {item.key: json.loads(item.value_json) for item in message.run.config.update}
            case "history":
                run.history.append(
                    {
                        item.key or ".".join(item.nested_key): json.loads(item.value_json)
                        for item in message.history.item
                    }
                )
            case "exit":
                run.exit_code = message.exit.exit_code
    return run


def _records(data: bytes) -> Iterator[bytes]:
    place, pieces = _HEADER, b""
    while place + _HEADER <= len(data):
        left = _BLOCK - place % _BLOCK
        if left < _HEADER:  # a header does not fit: the block is filled up
            place += left
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + _HEADER])
        pieces += data[place + _HEADER : place + _HEADER + length]
        place += _HEADER + length
        if kind in (1, 4):  # whole, or last
            yield pieces
            pieces = b""
