"""Which steps an offline W&B run holds already: its `.wandb` files, read back.

A run that is resumed offline writes a new file under the same id and cannot ask a server what the old one said. The
steps that both would hold would be doubled when they are synchronised, so the old files are asked.

The file is LevelDB's log (its doc/log_format.md) after seven bytes of W&B's own: blocks of 32 KiB with records of a
checksum (4 bytes), a length (2), and a type (1: whole; 2, 3, 4: first, middle, last part); each record is a protobuf.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEAD, BLOCK = 7, 32 * 1024
WHOLE, LAST = 1, 4


def records(path: Path) -> Iterator[Any]:
    """The `Record`s of a `.wandb` file, up to where a killed run left off."""
    from wandb.proto.wandb_internal_pb2 import Record  # pyright: ignore[reportAttributeAccessIssue]

    data = memoryview(path.read_bytes())
    at, parts = HEAD, b""
    while at + HEAD <= len(data):
        if (left := BLOCK - at % BLOCK) < HEAD:  # too small for another head: zeros
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        if kind == 0 or at + HEAD + length > len(data):
            return
        parts += data[at + HEAD : at + HEAD + length]
        at += HEAD + length
        if kind in (WHOLE, LAST):
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def last_step(folder: Path, run_id: str) -> int:
    """The last step that offline runs of this id in `folder` have logged; -1 for none."""
    from google.protobuf.message import DecodeError

    last = -1
    for path in folder.glob(f"wandb/offline-run-*-{run_id}/run-{run_id}.wandb"):
        try:
            for record in records(path):
                if record.WhichOneof("record_type") == "history":
                    last = max(last, record.history.step.num)
        except (OSError, DecodeError):  # damaged: its first part still counts
            continue
    return last
