"""Parquet files with the images in them, as Hugging Face publishes data sets: unpacked once, then read as a table.

A row has its image in the column `image`, a struct {bytes, path} or bytes. In PathVQA each image is repeated for every
question about it, and a row cannot be read without its neighbours; so each distinct image becomes one file, named by
what is in it, and the other columns a line of `rows.jsonl`. The folder lies among the indexes (`data.storage.index`)
and takes the room of the distinct images. No `path` of a file is followed.
"""

from __future__ import annotations

import base64
import glob
import hashlib
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from medclip.data.index import fingerprint
from medclip.data.progress import track
from medclip.types import UserError

_COLUMN = "image"
_ROWS = 64  # read at a time: an image may have megabytes


def unpack(target: str, folder: Path) -> Path | None:
    """The table of parquet files with images in them, beside the files it names; None for any other table.

    Args:
        target: path, or pattern of paths, of the files.
        folder: of indexes.

    Raises:
        UserError: no such file, a broken one, or a folder that cannot be written.
    """
    if not target.endswith(".parquet"):
        return None
    paths = sorted(glob.glob(str(Path(target).expanduser())))  # noqa: PTH207  # an absolute pattern
    if not paths:
        raise UserError(f"cannot read table {target}: no such file (relative to {Path.cwd()})")
    try:
        files = [pq.ParquetFile(path) for path in paths]
        if not all(_holds_images(file.schema_arrow) for file in files):
            return None
        stats = [(os.path.realpath(path), Path(path).stat().st_size, Path(path).stat().st_mtime_ns) for path in paths]
        done = folder / f"{fingerprint(stats)}.images"
        if not (done / "rows.jsonl").is_file():
            _write(files, done, target)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read table {target}: {str(error).strip()[:160]}") from error
    return done / "rows.jsonl"


def _holds_images(schema: pa.Schema) -> bool:
    if _COLUMN not in schema.names:
        return False
    kind = schema.field(_COLUMN).type
    kind = kind.field("bytes").type if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0 else kind
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _write(files: Sequence[pq.ParquetFile], done: Path, target: str) -> None:
    """All or nothing: a killed run leaves a folder under another name."""
    part = done.with_name(f".{done.name}.{os.getpid()}.part")
    part.mkdir(parents=True)
    try:
        with (part / "rows.jsonl").open("wb") as table:
            batches = (batch for file in files for batch in file.iter_batches(_ROWS))
            total = sum(-(-file.metadata.num_rows // _ROWS) for file in files)
            for batch in track(batches, total, f"unpacking the images of {target}"):
                for row in batch.to_pylist():
                    table.write(orjson.dumps(row | {_COLUMN: _kept(row[_COLUMN], part)}, default=_plain) + b"\n")
        with suppress(OSError):  # another process was faster
            part.replace(done)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _kept(image: Any, folder: Path) -> str | None:
    """Write an image unless it is there, and return its name."""
    data = image.get("bytes") if isinstance(image, dict) else image
    if not data:
        return None
    name = hashlib.blake2b(data, digest_size=16).hexdigest()
    if not (folder / name).exists():
        (folder / name).write_bytes(data)
    return name


def _plain(value: Any) -> str:
    return base64.b64encode(value).decode() if isinstance(value, bytes) else str(value)
